# SPDX-License-Identifier: Apache-2.0
"""The papers' runs: a pair differs in its mode alone, and the numbers are those of the papers' tables."""

import difflib
from pathlib import Path
from typing import Any

import pytest
import yaml

from m3po_lab.checkpoints import check_save_steps
from m3po_lab.config import PROJECT_ROOT, parse_run
from m3po_lab.eval_tasks import MARKER
from m3po_lab.session import rows_of_run

FOLDER = PROJECT_ROOT / "configs" / "papers"
RUNS = sorted(FOLDER.glob("*-m3po.yaml"))
OF_THE_MODEL = ("model_name_or_path", "chat_template_kwargs")


def settings(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text())


def test_there_is_one_control_for_each_of_the_four_models() -> None:
    assert len(RUNS) == 4
    assert sorted(FOLDER.iterdir()) == sorted(path for run in RUNS for path in (run, control(run)))
    assert len({settings(run)["model_name_or_path"] for run in RUNS}) == 4


def control(run: Path) -> Path:
    return run.with_name(run.name.replace("-m3po", "-grpo"))


@pytest.mark.parametrize("run", RUNS, ids=lambda path: path.stem)
def test_control_differs_from_its_run_in_the_line_of_the_mode_alone(run: Path) -> None:
    lines = difflib.ndiff(run.read_text().splitlines(), control(run).read_text().splitlines())
    assert [line for line in lines if not line.startswith("  ")] == ["- mode: m3po", "+ mode: none"]


@pytest.mark.parametrize("run", RUNS, ids=lambda path: path.stem)
def test_models_share_all_settings(run: Path) -> None:
    """A number corrected in one file and forgotten in another would make the models' results incomparable."""
    kept = [{key: value for key, value in settings(file).items() if key not in OF_THE_MODEL} for file in (run, RUNS[0])]
    assert kept[0] == kept[1]


def test_system_turn_is_the_one_of_the_evaluation() -> None:
    evaluated = settings(PROJECT_ROOT / "configs" / "eval" / "_paper_prompt.yaml")["description"]
    assert settings(RUNS[0])["system_prompt"] == evaluated.replace("{{marker}}", MARKER)


@pytest.mark.parametrize("run", RUNS, ids=lambda path: path.stem)
def test_a_step_has_64_completions_and_an_epoch_900_steps(run: Path) -> None:
    training = parse_run([str(run)]).training
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 64
    assert (training.generation_batch_size, training.num_generations) == (64, 8)
    assert rows_of_run(training, settings(run)["num_train_problems"]) / 8 == 900
    assert 900 % training.save_steps == 0
    check_save_steps(training)


def test_numbers_are_those_of_the_tables() -> None:
    """M3PO's table 3; sampling temperature, seed and layers are HRPO's (reference in the head of the files)."""
    run = parse_run([str(RUNS[0])])
    table = {
        "learning_rate": 5e-6, "lr_scheduler_type": "cosine", "warmup_steps": 0.1, "adam_beta1": 0.9,
        "adam_beta2": 0.99, "weight_decay": 0.1, "max_grad_norm": 0.1, "beta": 0.005, "bf16": True,
        "max_completion_length": 1024, "num_train_epochs": 1, "num_iterations": 1, "num_generations": 8,
        "cross_path_lambda": 0.1, "cross_path_temp": 0.1, "temperature": 0.5, "top_k": 0, "top_p": 1.0,
        "loss_type": "grpo", "scale_rewards": "group", "reward_weights": [1.0, 0.0], "seed": 42,
    }  # fmt: skip
    assert {name: getattr(run.training, name) for name in table} == table
    assert (run.model.use_peft, run.model.lora_r, run.model.lora_alpha, run.model.lora_dropout) == (True, 32, 64, 0.0)
    assert run.model.lora_target_modules == [
        f"{layer}_proj" for layer in ("q", "k", "v", "o", "gate", "up", "down")
    ]  # fmt: skip
