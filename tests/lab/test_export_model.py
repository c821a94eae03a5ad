# SPDX-License-Identifier: Apache-2.0
"""An exported model is an ordinary checkpoint that computes what the trained one does."""

import errno
import json
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig

from m3po_lab.export_model import main
from m3po_lab.models import load_model

NUMBERS = {"mode": "m3po", "cross_path_lambda": 0.3, "answer_start": "####"}


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    """A LoRA adapter of the tiny model whose matrices are all far from zero."""
    base, tokenizer = load_model(ModelConfig(model_name_or_path=str(tiny_model), dtype="float32"))
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "m3po.json").write_text(json.dumps(NUMBERS))
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(2, 22).reshape(2, 10)).logits


def test_merged_model_computes_what_the_adapter_does(adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    """1e-5 in float32: merging adds the same numbers in another order."""
    assert main([str(adapter), str(tmp_path / "out")]) == 0
    trained, _ = load_model(ModelConfig(model_name_or_path=str(adapter), dtype="float32"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(merged).__name__ == "LlamaForCausalLM"
    config = (tmp_path / "out" / "config.json").read_text() + (tmp_path / "out" / "generation_config.json").read_text()
    assert not re.search("cross_path|gating|thinking|m3po", config), "a field that a stock server does not know"
    assert merged.state_dict().keys() == AutoModelForCausalLM.from_pretrained(tiny_model).state_dict().keys()
    torch.testing.assert_close(logits(merged), logits(trained), atol=1e-5, rtol=0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    assert (logits(merged) - logits(base)).abs().max() > 0.1


def test_export_of_a_run_has_everything_and_only_safetensors(
    finished_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    closed_files: Callable[[Path], list[str]],
) -> None:
    final, out = finished_run / "final", tmp_path / "out"
    assert main([str(final), str(out), "--dtype", "bfloat16"]) == 0
    assert "stock vLLM can serve it" in capsys.readouterr().out
    names = {path.name for path in out.iterdir()}
    assert closed_files(out) == closed_files(finished_run) == []
    assert {"model.safetensors", "tokenizer.json", "config.json", "generation_config.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    for name in ("m3po.json", "evaluation.json"):
        assert json.loads((out / name).read_text()) == json.loads((final / name).read_text())
    with safe_open(out / "model.safetensors", framework="pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(final).chat_template


def test_what_cannot_be_exported_is_one_line_and_writes_nothing(
    adapter: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([str(tiny_model), str(out)]) == 2
    assert "has no m3po.json" in capsys.readouterr().err
    for mode, said in (("hrpa", "mode hrpa is unknown; known: none, m3po, hrpo, h3po"), ("hrpo", "no residual gate")):
        (adapter / "m3po.json").write_text(json.dumps(NUMBERS | {"mode": mode}))
        assert main([str(adapter), str(out)]) == 2
        assert said in capsys.readouterr().err
        assert not out.exists()
    out.mkdir()
    (out / "mine").write_text("keep")
    (adapter / "m3po.json").write_text(json.dumps(NUMBERS))
    assert main([str(adapter), str(out)]) == 2
    assert f"OUT={out} exists already" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_killed_export_leaves_no_half_model(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*words: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    monkeypatch.setattr(import_module("transformers.m3po"), "write_checkpoint_info", full)
    assert main([str(adapter), str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: No space left on device: x; the disk is full") and printed.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
