# SPDX-License-Identifier: Apache-2.0
"""The commands that the pages show are read by the real parsers, and the problems of trainings load."""

import json
import shlex
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from docs.pages import PAGES, ROOT, code_blocks

from m3po_lab.controller.arguments import parse as parse_controller
from m3po_lab.core.config_files import find_config
from m3po_lab.eval_gsm8k import parser
from m3po_lab.evaluation.datasets import choose
from m3po_lab.experiments.run_m3po_experiment import main as study
from m3po_lab.grpo.arguments import Run
from m3po_lab.grpo.config import parse_run
from m3po_lab.problems.arguments import DataArguments
from m3po_lab.problems.data import load_problems
from m3po_lab.sweep import main as sweep


def shown_commands(start: str) -> list[list[str]]:
    """The words after `start` in every such command of the pages' code blocks."""
    text = "".join(block for name in PAGES for block in code_blocks("bash", name))
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.startswith(start)]
    commands = [shlex.split(line, comments=True)[len(start.split()) :] for line in lines]
    return sorted({tuple(words): words for words in commands if not {"--help", "..."} & set(words)}.values())


TRAININGS = shown_commands("bash scripts/train_grpo.sh")
EVALUATIONS = shown_commands("bash scripts/eval_gsm8k.sh")
SWEEPS = shown_commands("bash scripts/sweep.sh")
STUDIES = shown_commands("bash scripts/run_experiment.sh")
CONTROLLERS = shown_commands("bash scripts/train_controller.sh")
ENGINES = [f"ACCELERATE_CONFIG=configs/accelerate/{file.name}" for file in (ROOT / "configs/accelerate").iterdir()]
SEVERAL = [words for engine in ENGINES for words in shown_commands(f"{engine} bash scripts/train_grpo.sh")]
LAUNCHES = shown_commands("bash scripts/run.sh accelerate launch")


def test_commands_of_each_kind_are_found() -> None:
    """A search that finds nothing would let the next tests pass."""
    assert all([TRAININGS, EVALUATIONS, SWEEPS, STUDIES, CONTROLLERS, SEVERAL, LAUNCHES])


@pytest.mark.parametrize("words", SWEEPS, ids=" ".join)
def test_a_shown_sweep_is_accepted(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m3po_lab.experiments.sweep.run_sweep", lambda *arguments: 0)
    assert sweep(words) == 0


@pytest.mark.parametrize("words", STUDIES, ids=" ".join)
def test_a_shown_study_is_planned(words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("m3po_lab.study.runs.run_study", lambda runs, folder, jobs: 0)
    assert study([*words, "--output_dir", str(tmp_path)]) == 0
    assert (tmp_path / "study.json").is_file() == ("--dry-run" not in words)


@pytest.mark.parametrize("words", CONTROLLERS, ids=" ".join)
def test_a_shown_controller_is_accepted(words: list[str]) -> None:
    run = parse_controller(words)
    assert run.checkpoint == words[0] and run.script.gates and run.folder.is_relative_to(ROOT / "runs")


def test_the_controller_is_trained_on_the_problems_of_its_models_text() -> None:
    controller, text = (
        yaml.safe_load((ROOT / f"configs/{name}_arithmetic.yaml").read_text("utf-8")) for name in ("controller", "mhc")
    )
    assert all(controller[key] == text[key] for key in ("dataset", "dataset_config"))
    assert controller["num_eval_problems"] <= DataArguments().num_eval_problems, "so many are in no text"


@pytest.mark.parametrize("words", EVALUATIONS, ids=" ".join)
def test_a_shown_evaluation_is_accepted(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m3po_lab.evaluation.datasets.hub_error", lambda: None)
    arguments = parser().parse_args(words)
    assert choose(arguments.dataset, arguments.num_fewshot)[0]


@pytest.mark.parametrize("words", SEVERAL, ids=" ".join)
def test_a_shown_training_in_several_processes_is_accepted(words: list[str]) -> None:
    assert parse_run(words).training.mode == "m3po"


@pytest.mark.parametrize("words", LAUNCHES, ids=" ".join)
def test_a_shown_launch_is_accepted(words: list[str]) -> None:
    arguments = launch_command_parser().parse_args(words)
    assert find_config(arguments.config_file)
    assert (arguments.module, arguments.training_script) == (True, "m3po_lab.train")
    assert parse_run(arguments.training_script_args).training.mode == "m3po"


@pytest.mark.parametrize("words", TRAININGS, ids=" ".join)
def test_a_shown_training_is_accepted(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"question": f"What is {i} + 1?", "answer": f"It is.\n#### {i + 1}"} for i in range(1200)]
    (tmp_path / "my_problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trl.trainer.m3po.checks.find_spec", lambda name: name)  # vLLM is of an extra
    run: Run = parse_run(words)
    train, held_out = load_problems(run.script)
    assert train and len(held_out) == run.script.num_eval_problems
