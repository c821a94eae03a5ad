# SPDX-License-Identifier: Apache-2.0
"""Runs whose model has a residual gate: what is saved, loaded, evaluated and exported, full and as an adapter."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.m3po.thinking.residual_gate import RESIDUAL_GATE_PARAMETERS
from trl import ModelConfig

from m3po_lab import eval_gsm8k, export_model
from m3po_lab.core.errors import UserError
from m3po_lab.core.files import read_json
from m3po_lab.models.loading import load_model
from m3po_lab.train import main

SHORT = ("--dataset", "problems", "--batch_size", "6")
LORA = ("--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "q_proj", "down_proj")


@pytest.fixture(scope="module")
def adapter_run(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of mode hrpo with LoRA."""
    folder = tmp_path_factory.mktemp("run") / "hrpo"
    words = ["--mode", "hrpo", "--thought_top_k", "8", "--thinking_residual_r_min", "0.5", "--max_steps", "2", *LORA]
    assert main([str(tiny_config), *words, "--output_dir", str(folder)]) == 0
    return folder


def weights_of(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    file = next(folder.glob("*.safetensors"))
    return file, load_file(file)


def without_decay(run: Path, out: Path) -> Path:
    """A copy of a run's final checkpoint that lacks Λ."""
    folder = Path(shutil.copytree(run / "final", out / run.name / "final"))
    file, weights = weights_of(folder)
    kept = {name: weight for name, weight in weights.items() if not name.endswith(RESIDUAL_GATE_PARAMETERS[-1])}
    assert len(kept) == len(weights) - 1
    save_file(kept, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("run", ["h3po_run", "adapter_run"])
def test_a_checkpoint_carries_the_gate_in_float32_and_says_its_numbers(
    run: str, request: pytest.FixtureRequest
) -> None:
    final = request.getfixturevalue(run) / "final"
    _, weights = weights_of(final)
    for name in RESIDUAL_GATE_PARAMETERS:
        (found,) = [weight for key, weight in weights.items() if key.endswith(name)]
        assert found.dtype == torch.float32
    numbers = read_json(final / "m3po.json") or {}
    told = {"thought_top_k": 8, "thinking_residual_r_min": 0.5, "thinking_residual_r_max": 0.999}
    assert told.items() <= numbers.items() and ("cross_path_lambda" in numbers) == (run == "h3po_run")


@pytest.mark.parametrize("run", ["h3po_run", "adapter_run"])
def test_weights_adapters_and_the_reference_model_have_the_permissions_of_other_files(
    run: str, request: pytest.FixtureRequest, closed_files: Callable[[Path], list[str]]
) -> None:
    assert closed_files(request.getfixturevalue(run)) == []


def test_a_run_that_starts_from_an_adapter_knows_what_its_gate_began_with(adapter_run: Path) -> None:
    model, _ = load_model(ModelConfig(model_name_or_path=str(adapter_run / "final"), dtype="float32"))
    assert (model.config.thinking_residual_r_min, model.config.thinking_residual_r_max) == (0.5, 0.999)


def test_the_gate_learned(h3po_run: Path) -> None:
    """Otherwise nothing that is compared here would show whether it is the trained one."""
    _, first = weights_of(h3po_run / "checkpoint-2")
    _, last = weights_of(h3po_run / "final")
    for name in RESIDUAL_GATE_PARAMETERS:
        assert not torch.equal(first[f"model.{name}"], last[f"model.{name}"]), name


@pytest.mark.parametrize("run", ["h3po_run", "adapter_run"])
def test_evaluation_keeps_the_thoughts_on_and_finds_the_report_again(
    run: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = request.getfixturevalue(run)
    assert eval_gsm8k.main([str(folder / "final"), *SHORT, "--output_dir", str(tmp_path)]) == 0
    assert "evaluated one path with its soft thoughts" in capsys.readouterr().out
    results = read_json(tmp_path / "results.json") or {}
    assert results["agreement"]["same_completion"] == results["agreement"]["problems"] == 6


def test_thoughts_change_what_an_evaluation_answers(h3po_run: Path, tmp_path: Path) -> None:
    """All thought and no token, of flat distributions, against the same lively weights without their gate."""
    deep, plain = (Path(shutil.copytree(h3po_run / "final", tmp_path / name / "final")) for name in ("deep", "plain"))
    for folder in (deep, plain):
        torch.manual_seed(0)
        file, weights = weights_of(folder)
        weights[f"model.{RESIDUAL_GATE_PARAMETERS[-1]}"].fill_(-9.0)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name].normal_()
        if folder == plain:
            weights = {name: weight for name, weight in weights.items() if "thinking_residual" not in name}
        save_file(weights, file, metadata={"format": "pt"})
    numbers = json.loads((deep / "m3po.json").read_text())
    (deep / "m3po.json").write_text(json.dumps(numbers | {"sampling_temperature": 9.0}))
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"thinking_residual_enabled": False}))
    (plain / "m3po.json").write_text(json.dumps({"mode": "none", "answer_start": "####"}))
    told = {}
    for name, folder in (("with", deep), ("without", plain)):
        assert eval_gsm8k.main([str(folder), *SHORT, "--output_dir", str(tmp_path / name)]) == 0
        lines = (tmp_path / name / "problems.jsonl").read_text().splitlines()
        told[name] = [json.loads(line)["completions"] for line in lines]
    assert told["with"] != told["without"]


@pytest.mark.parametrize("run", ["h3po_run", "adapter_run"])
def test_paths_of_a_problem_are_sampled_with_their_thoughts(
    run: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(request.getfixturevalue(run) / "final"), *SHORT, "--num_paths", "4", "--output_dir", str(tmp_path)]
    assert eval_gsm8k.main(words) == 0
    kind = "a cross-path group" if run == "h3po_run" else "independent samples"
    assert f"4 paths of each problem as {kind}" in capsys.readouterr().out
    assert "majority_vote,all" in (read_json(tmp_path / "results.json") or {})["results"]["problems"]


def test_gate_that_nobody_trained_is_refused(
    finished_run: Path, h3po_run: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = Path(shutil.copytree(h3po_run / "final", tmp_path / "lost"))
    (lost / "m3po.json").unlink()
    for words, said in (
        ([str(tiny_model), "--mode", "hrpo"], "--mode hrpo: "),
        ([str(finished_run / "final"), "--mode", "h3po"], "says mode none"),
        ([str(h3po_run / "final"), "--mode", "none"], "says mode h3po"),
        ([str(lost)], "has a residual gate, which does not fit mode none"),
    ):
        assert eval_gsm8k.main([*words, *SHORT, "--output_dir", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


@pytest.mark.parametrize("run", ["h3po_run", "adapter_run"])
def test_checkpoint_without_its_gate_is_an_error_and_not_a_random_gate(
    run: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = without_decay(request.getfixturevalue(run), tmp_path)
    with pytest.raises(UserError, match="thinking_residual_Lambda"):
        load_model(ModelConfig(model_name_or_path=str(folder), dtype="float32"))


@pytest.mark.parametrize(("run", "dtype"), [("h3po_run", "bfloat16"), ("adapter_run", "float32")])
def test_exported_model_keeps_its_gate_and_computes_what_the_checkpoint_does(
    run: str, dtype: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    final, out = request.getfixturevalue(run) / "final", tmp_path / "out"
    assert export_model.main([str(final), str(out), "--dtype", dtype]) == 0
    assert "stock vLLM cannot serve it" in capsys.readouterr().out
    _, written = weights_of(out)
    _, saved = weights_of(final)
    for name in RESIDUAL_GATE_PARAMETERS:
        (trained,) = [weight for key, weight in saved.items() if key.endswith(name)]
        assert torch.equal(written[f"model.{name}"], trained)
    assert written["model.norm.weight"].dtype == getattr(torch, dtype)
    if dtype == "float32":
        ids, bag = torch.arange(2, 22).reshape(2, 10), torch.arange(1, 21).reshape(2, 10, 1)
        bags = {"thinking_bag_ids": bag.int(), "thinking_bag_weights": torch.full(bag.shape, 3.0)}
        logits = []
        for folder in (final, out):
            model, _ = load_model(ModelConfig(model_name_or_path=str(folder), dtype="float32"))
            with torch.no_grad():
                logits += [model.eval()(ids, **bags).logits, model(ids).logits]
        torch.testing.assert_close(logits[0], logits[2], atol=1e-5, rtol=0)  # merging adds in another order
        assert (logits[0] - logits[1]).abs().max() > 0.01, "the thoughts do nothing"
