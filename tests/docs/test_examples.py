# SPDX-License-Identifier: Apache-2.0
"""The Python of the pages runs as it stands, on a tiny model in the folder that it names."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from m3po_lab.models.embedded import embedded_gguf, repair_embedded

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = [
    (page, block)
    for page in ("README.md", "docs/differences.md")
    for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
]


@pytest.fixture
def folder_with_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Callable[..., Any]) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(str(embedded_gguf().parent), gguf_file=embedded_gguf().name)
    repair_embedded(SimpleNamespace(config=SimpleNamespace(), generation_config=SimpleNamespace()), tokenizer)
    model = tiny_llama(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(tmp_path / "my-model")
    tokenizer.save_pretrained(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_examples_are_found() -> None:
    assert [page for page, _ in EXAMPLES] == ["README.md", "docs/differences.md"]


@pytest.mark.parametrize(("page", "example"), EXAMPLES, ids=[page for page, _ in EXAMPLES])
def test_example_runs_as_it_stands(
    page: str, example: str, folder_with_a_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(compile(example, page, "exec"), {"__name__": "__main__"})
    shown = {"README.md": "tensor(", "docs/differences.md": "Thinking embeds shape: torch.Size([8, "}
    assert shown[page] in capsys.readouterr().out
