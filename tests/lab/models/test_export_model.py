# SPDX-License-Identifier: Apache-2.0
"""An exported model is an ordinary checkpoint that computes what the trained one does."""

import errno
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lab.conftest import WORDS
from lab.models.embedding_adapters import WAYS, far_from_start, logits, with_tying
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.m3po.aslr.modules import attach_aslr
from transformers.m3po.aslr.settings import ASLR_HYPERPARAMETERS
from transformers.m3po.gating.module import attach_gating
from transformers.m3po.modules import ASLR, GATING, RESIDUAL_GATE
from transformers.m3po.thinking.residual_gate import attach_residual_gate
from trl import ModelConfig

from m3po_lab.export_model import main
from m3po_lab.models.loading import load_model

NUMBERS = {"mode": "m3po", "cross_path_lambda": 0.3, "answer_start": "####"}


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    return adapter_of(tiny_model, tmp_path / "adapter")


def adapter_of(start: Path, folder: Path) -> Path:
    """A LoRA adapter of a model whose matrices are all far from zero."""
    base, tokenizer = load_model(ModelConfig(model_name_or_path=str(start), dtype="float32"))
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "m3po.json").write_text(json.dumps(NUMBERS))
    return folder


@pytest.mark.all_families
def test_merged_model_computes_what_the_adapter_does(
    family: Callable[..., PreTrainedModel], tiny_model: Path, tmp_path: Path
) -> None:
    """1e-5 in float32: merging adds the same numbers in another order."""
    start, out = tmp_path / "start", tmp_path / "out"
    made = family(vocab_size=len(WORDS), tie_word_embeddings=False)
    made.save_pretrained(start)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(start)
    adapter = adapter_of(start, tmp_path / "adapter")
    assert main([str(adapter), str(out)]) == 0
    trained, _ = load_model(ModelConfig(model_name_or_path=str(adapter), dtype="float32"))
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert type(merged) is type(made)
    config = (out / "config.json").read_text() + (out / "generation_config.json").read_text()
    assert not re.search("cross_path|gating|thinking|m3po", config), "a field that a stock server does not know"
    assert merged.state_dict().keys() == made.state_dict().keys()
    torch.testing.assert_close(logits(merged), logits(trained), atol=1e-5, rtol=0)
    assert (logits(merged) - logits(made)).abs().max() > 0.1


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

    monkeypatch.setattr("m3po_lab.models.export.write_checkpoint_info", full)
    assert main([str(adapter), str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: No space left on device: x; the disk is full") and printed.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def adapted(start: Path, folder: Path, numbers: dict[str, Any], before: Any = None, **config: Any) -> Any:
    """A model with an adapter far from its start, saved in `folder` as a run saves it."""
    base, _ = load_model(ModelConfig(model_name_or_path=str(start), dtype="float32"))
    if before is not None:
        before(base)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **config))
    far_from_start(model)
    model.save_pretrained(folder)
    (folder / "m3po.json").write_text(json.dumps(numbers))
    return model


def told_difference(printed: str) -> float:
    (told,) = re.findall(r"largest difference of a logit is (\S+),", printed)
    return float(told)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_may_touch_the_embeddings_and_the_head(
    way: str, tied: bool, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where they are one matrix, what is merged into one of the two must not reach the other."""
    start = with_tying(tiny_model, tmp_path / "start", tied)
    wanted = logits(adapted(start, tmp_path / "adapter", NUMBERS, **WAYS[way]))
    assert main([str(tmp_path / "adapter"), str(tmp_path / "out")]) == 0
    bound, printed = 1e-5 * float(wanted.abs().max()), capsys.readouterr().out
    assert told_difference(printed) < bound and "stock vLLM can serve it" in printed
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(out), wanted, atol=bound, rtol=0)
    one = out.lm_head.weight.data_ptr() == out.model.embed_tokens.weight.data_ptr()
    untouched = way in ("LoRA on all-linear", "three tokens") or way.endswith(", tied")
    assert one == out.config.tie_word_embeddings == (tied and untouched)


def with_added_modules(base: Any) -> None:
    attach_residual_gate(base, 0.3, 0.6, seed=1)
    attach_aslr(base, aslr_num_paths=2, aslr_max_iterations=2)
    attach_gating(base, "luong", {"size": 8}, seed=2)


OWN = [name for own in (RESIDUAL_GATE, ASLR, GATING) for name in own.names]


@pytest.fixture
def everything(tiny_model: Path, tmp_path: Path) -> Path:
    """An adapter with all modules of this overlay, on a tied model, that trains the embeddings too."""
    start = with_tying(tiny_model, tmp_path / "start", tied=True)
    base, _ = load_model(ModelConfig(model_name_or_path=str(start)))
    with_added_modules(base)
    asked = {"gating_type": "luong", "gating_config": base.config.m3po_gating_config}
    numbers = {
        "mode": "h3po",
        "aslr_enabled": True,
        **{name: getattr(base.config, name) for name in ASLR_HYPERPARAMETERS},
    }
    saved = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": OWN}
    adapted(start, tmp_path / "adapter", NUMBERS | numbers | asked, with_added_modules, **saved)
    return tmp_path / "adapter"


@pytest.mark.parametrize("left", [[], ["--aslr", "off"], ["--gating", "off"], ["--aslr", "off", "--gating", "off"]])
def test_modules_of_the_overlay_are_exported_with_it_or_left_out_as_asked(
    left: list[str], everything: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(everything), str(tmp_path / "out"), *left]) == 0
    assert told_difference(capsys.readouterr().out) < 1e-4


def test_rounding_to_bfloat16_is_told_and_is_no_reason_to_refuse(
    everything: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(everything), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    assert told_difference(capsys.readouterr().out) > 1e-3


def spoiled(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Makes what an export writes another model: `change` gets the folder after the weights are there."""
    save = PreTrainedModel.save_pretrained

    def saving(model: Any, folder: Path, **given: Any) -> None:
        save(model, folder, **given)
        change(folder)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", saving)


def one_weight(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name] = weights[name] * 1.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def another_theta(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 5.0
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda folder: one_weight(folder, "model.norm.weight"), "a logit of what was written differs by"),
        (another_theta, "a logit of what was written differs by"),
        (lambda folder: one_weight(folder, "model.m3po_gating.U"), "m3po_gating.U of what was written is not the"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_model_than_the_checkpoint_is_not_exported(
    change: Any,
    why: str,
    dtype: str,
    everything: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoiled(monkeypatch, change)
    assert main([str(everything), str(tmp_path / "out"), "--dtype", dtype]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: not exported: ") and why in printed.err and printed.err.count("\n") == 1
    assert "written to" not in printed.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "start"]


def test_a_wrong_merge_is_not_exported(
    everything: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # PEFT's own merge reaches the tied head as well
    monkeypatch.setattr("m3po_lab.models.export.merged", lambda model: model.merge_and_unload())
    assert main([str(everything), str(tmp_path / "out")]) == 2
    assert "a logit of the merged model differs by" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "start"]


def test_weights_that_overflow_float16_or_are_no_numbers_are_not_exported(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def huge(base: Any) -> None:
        base.model.norm.weight.data[:] = 1e5

    folder = Path(with_tying(tiny_model, tmp_path / "start", tied=False))
    base, _ = load_model(ModelConfig(model_name_or_path=str(folder)))
    huge(base)
    base.save_pretrained(folder)
    (folder / "m3po.json").write_text(json.dumps(NUMBERS))
    assert main([str(folder), str(tmp_path / "out"), "--dtype", "float16"]) == 2
    assert "differs by nan" in capsys.readouterr().err
    assert main([str(folder), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    broken = tmp_path / "broken"
    adapted(tiny_model, broken, NUMBERS, target_modules=["q_proj"])
    weights = load_file(broken / "adapter_model.safetensors")
    save_file({name: value / 0 for name, value in weights.items()}, broken / "adapter_model.safetensors")
    capsys.readouterr()
    assert main([str(broken), str(tmp_path / "other")]) == 2
    assert "the adapter cannot be merged: NaNs detected" in capsys.readouterr().err


def test_a_model_with_hyper_connections_is_not_said_to_be_servable(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_tying(tiny_model, tmp_path / "start", tied=False)
    model = AutoModelForCausalLM.from_pretrained(folder, mhc_enabled=True)
    far_from_start(model)
    model.save_pretrained(folder)
    (folder / "m3po.json").write_text(json.dumps({"mode": "none"}))
    assert main([str(folder), str(tmp_path / "out")]) == 0
    assert "stock vLLM cannot serve it: it has hyper-connections" in capsys.readouterr().out
