# SPDX-License-Identifier: Apache-2.0
"""A session's trainer: its reference model is the start model, whatever that was loaded as."""

import shutil
from pathlib import Path

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


def test_adapter_of_a_run_names_the_revision_of_its_base(tiny_config: Path, tmp_path: Path) -> None:
    words = ["--use_peft", "true", "--lora_target_modules", "all-linear", "--model_revision", "v2"]
    run = parse_run([str(tiny_config), *words, "--output_dir", str(tmp_path)])
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "What is 1 + 2 ?"}], "reference": "3"}] * 8)
    trainer = session.build_trainer(run, rows, session.TrainingClock())
    assert trainer.model.peft_config["default"].revision == "v2"
