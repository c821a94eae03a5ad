# SPDX-License-Identifier: Apache-2.0
"""The Python of the pages runs as it stands, on a tiny model in the folder that it names."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from docs.pages import code_blocks
from transformers import AutoTokenizer

from m3po_lab.models.embedded import embedded_gguf, repair_embedded

# Page -> what its example prints.
SHOWN = {"README.md": "'train_loss'", "docs/differences.md": "Thinking embeds shape: torch.Size([8, "}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """That of the embedded model, read once: out of a GGUF file it takes a while."""
    tokenizer = AutoTokenizer.from_pretrained(str(embedded_gguf().parent), gguf_file=embedded_gguf().name)
    repair_embedded(SimpleNamespace(config=SimpleNamespace(), generation_config=SimpleNamespace()), tokenizer)
    return tokenizer


@pytest.fixture
def folder_with_a_model(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Callable[..., Any]
) -> Path:
    model = tiny_llama(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(tmp_path / "my-model")
    tokenizer.save_pretrained(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", SHOWN)
def test_the_example_of_a_page_runs_as_it_stands(
    name: str, folder_with_a_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = code_blocks("python", name)
    exec(compile(example, name, "exec"), {"__name__": "__main__"})
    assert SHOWN[name] in capsys.readouterr().out
