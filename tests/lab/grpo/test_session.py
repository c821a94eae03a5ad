# SPDX-License-Identifier: Apache-2.0
"""A session's trainer: its reference model is the start model, whatever that was loaded as."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from m3po_lab.evaluation.evaluate import Answered
from m3po_lab.evaluation.settings import EvalSettings
from m3po_lab.grpo import session
from m3po_lab.grpo.config import parse_run
from m3po_lab.problems.data import load_problems, training_rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_model_is_the_start_model(tiny_config: Path, tmp_path: Path, dtype: str) -> None:
    """TRL loads it anew, in fp32 unless told: a KL that is not 0 at the start would be against another model."""
    words = ["--beta", "0.1", "--dtype", dtype, "--output_dir", str(tmp_path)]
    run = parse_run([str(tiny_config), *words])
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "What is 1 + 2 ?"}], "reference": "3"}] * 8)
    trainer = session.build_trainer(run, rows, session.TrainingClock())
    start, reference = trainer.model.state_dict(), trainer.ref_model.state_dict()
    assert start.keys() == reference.keys()
    assert all(value.dtype == getattr(torch, dtype) for value in reference.values())
    assert all(torch.equal(value, reference[name]) for name, value in start.items())


def test_baseline_is_kept_until_the_start_model_changes(
    tiny_config: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    run = parse_run([str(tiny_config), "--model_name_or_path", str(model), "--output_dir", str(tmp_path / "run")])
    _, held_out = load_problems(run.script)
    trainer = session.build_trainer(run, training_rows(held_out, run.script, 8), session.TrainingClock())
    settings = EvalSettings.of_run(run.script, run.training, "no")
    evaluated: list[str] = []

    def evaluate_now(trainer: object, settings: object, label: str) -> list[Answered]:
        evaluated.append(label)
        return [Answered("#### 1", True, True)] * len(held_out)

    monkeypatch.setattr(session, "evaluate_now", evaluate_now)
    for _ in range(2):
        assert len(session.evaluate_before(run, trainer, held_out, settings)) == len(held_out)
    assert len(evaluated) == 1
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    session.evaluate_before(run, trainer, held_out, settings)
    run.model.attn_implementation = "eager"
    session.evaluate_before(run, trainer, held_out, settings)
    assert len(evaluated) == 3


def test_a_start_model_is_evaluated_once_for_all_runs_that_start_alike(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A residual gate is of the run's own seed; ASLR and the learning rate do not act in the evaluation."""
    evaluated: list[str] = []

    def evaluate_now(trainer: Any, settings: object, label: str) -> list[Answered]:
        evaluated.append(Path(trainer.args.output_dir).name)
        return [Answered("#### 1", True, True)] * 6

    def begin(name: str, *words: str) -> None:
        run = parse_run([str(tiny_config), *words, "--output_dir", str(tmp_path / name)])
        _, held_out = load_problems(run.script)
        trainer = session.build_trainer(run, training_rows(held_out, run.script, 8), session.TrainingClock())
        settings = EvalSettings.of_run(run.script, run.training, "no")
        assert len(session.evaluate_before(run, trainer, held_out, settings)) == 6

    monkeypatch.setattr(session, "evaluate_now", evaluate_now)
    begin("none-seed0")
    begin("m3po-seed1", "--mode", "m3po", "--seed", "1", "--learning_rate", "1e-3")
    begin("none-aslr", "--aslr_enabled", "true")
    assert evaluated == ["none-seed0"]
    printed = [line for line in capsys.readouterr().out.splitlines() if "evaluated before" in line]
    assert len(printed) == 2 and "start_evaluations" in printed[0]
    begin("hrpo-seed0", "--mode", "hrpo", "--seed", "0")
    begin("hrpo-seed1", "--mode", "hrpo", "--seed", "1")
    begin("longer", "--max_completion_length", "5")
    monkeypatch.setattr(session, "source_digest", lambda *_: "of other code")
    begin("other-code")
    assert evaluated[1:] == ["hrpo-seed0", "hrpo-seed1", "longer", "other-code"]
    assert (tmp_path / "m3po-seed1" / "baseline.json").read_bytes() == (
        tmp_path / "none-seed0" / "baseline.json"
    ).read_bytes()


def test_adapter_of_a_run_names_the_revision_of_its_base(tiny_config: Path, tmp_path: Path) -> None:
    words = ["--use_peft", "true", "--lora_target_modules", "all-linear", "--model_revision", "v2"]
    run = parse_run([str(tiny_config), *words, "--output_dir", str(tmp_path)])
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "What is 1 + 2 ?"}], "reference": "3"}] * 8)
    trainer = session.build_trainer(run, rows, session.TrainingClock())
    assert trainer.model.peft_config["default"].revision == "v2"
