# SPDX-License-Identifier: Apache-2.0
"""The papers' runs: a pair differs in its mode alone, and the numbers are those of the papers' tables."""

import difflib
from pathlib import Path
from typing import Any

import pytest
import yaml

from m3po_lab.core.errors import PROJECT_ROOT
from m3po_lab.evaluation.tasks import MARKER
from m3po_lab.grpo.checkpoints import check_save_steps
from m3po_lab.grpo.config import parse_run
from m3po_lab.grpo.session import rows_of_run

FOLDER = PROJECT_ROOT / "configs" / "papers"
RUNS = sorted(FOLDER.glob("*-m3po.yaml"))
OF_THE_MODEL = ("model_name_or_path", "chat_template_kwargs")


def settings(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text())


def test_there_is_one_control_for_each_of_the_six_models() -> None:
    assert len(RUNS) == 6 and all(control(run).is_file() for run in RUNS)
    assert len({settings(run)["model_name_or_path"] for run in RUNS}) == 6


def test_models_that_no_paper_has_are_said_to_be_ours() -> None:
    ours = {run.stem for run in RUNS if "\n# Ours: no paper has this model." in run.read_text()}
    assert ours == {run.stem for run in RUNS if "qwen3" in run.stem} and len(ours) == 2


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


HRPO_RUNS = sorted(FOLDER.glob("*-hrpo.yaml"))


def test_hrpo_has_three_runs_for_each_of_two_models() -> None:
    data = {(settings(file)["dataset"], settings(file)["model_name_or_path"]) for file in HRPO_RUNS}
    assert len(HRPO_RUNS) == len(data) == 6


@pytest.mark.parametrize("file", HRPO_RUNS, ids=lambda path: path.stem)
def test_hrpo_runs_have_the_numbers_of_its_tables(file: Path) -> None:
    """HRPO's tables 4 and 5; what is not listed is as in the runs of M3PO, whose paper took it from there."""
    run = parse_run([str(file)])
    group, completions, length = {"gsm8k": (4, 32, 512), "math-": (8, 64, 1024), "mmlu-": (8, 64, 512)}[file.stem[:5]]
    assert (run.training.num_generations, run.training.generation_batch_size) == (group, completions)
    assert run.training.max_completion_length == length
    table = {
        "mode": "hrpo", "thinking_residual_r_min": 0.99, "thinking_residual_r_max": 0.999,
        "thinking_residual_gate_learning_rate": 1e-4, "thinking_residual_lambda_learning_rate": 1e-3,
    }  # fmt: skip
    assert {name: getattr(run.training, name) for name in table} == table
    own = {*table, "num_generations", "per_device_train_batch_size", "max_completion_length", "dataset"}
    own |= {"num_train_problems", "num_eval_problems", "cross_path_lambda", "cross_path_temp", *OF_THE_MODEL}
    told = [{key: value for key, value in settings(one).items() if key not in own} for one in (file, RUNS[-1])]
    assert told[0] == told[1]
    check_save_steps(run.training)


def test_h3po_run_is_the_one_of_m3po_with_the_gate_of_hrpo() -> None:
    ours, m3po, hrpo = (settings(FOLDER / f"gsm8k-qwen2.5-1.5b-{mode}.yaml") for mode in ("h3po", "m3po", "hrpo"))
    gate = {key: value for key, value in hrpo.items() if key.startswith("thinking_residual")}
    assert len(gate) == 4 and ours == {**m3po, **gate, "mode": "h3po"}
