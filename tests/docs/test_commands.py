# SPDX-License-Identifier: Apache-2.0
"""The commands that the pages show are read by the real parsers, and the problems of trainings load."""

import json
import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from m3po_lab.core.config_files import find_config
from m3po_lab.eval_gsm8k import parser
from m3po_lab.evaluation.datasets import choose
from m3po_lab.grpo.arguments import Run
from m3po_lab.grpo.config import parse_run
from m3po_lab.problems.data import load_problems
from m3po_lab.sweep import main as sweep

ROOT = Path(__file__).resolve().parents[2]
TRAIN = "bash scripts/train_grpo.sh"
LAUNCH = "bash scripts/run.sh accelerate launch"
EVALUATE = "bash scripts/eval_gsm8k.sh"
SWEEP = "bash scripts/sweep.sh"


def shown_commands(start: str, *pages: str) -> list[list[str]]:
    """The words after `start` in every such command of the pages' code blocks."""
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in pages)
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines if line.startswith(start)]
    return [words[len(start.split()) :] for words in found if "--help" not in words]


TRAININGS = shown_commands(TRAIN, "README.md", "docs/aslr.md", "docs/runs.md")
EVALUATIONS = shown_commands(EVALUATE, "README.md", "docs/evaluation.md", "docs/aslr.md")
ENGINES = [f"ACCELERATE_CONFIG=configs/accelerate/{file.name}" for file in (ROOT / "configs/accelerate").iterdir()]
PAGES = ("README.md", "docs/processes.md")
SWEEPS = shown_commands(SWEEP, "docs/results.md", "docs/aslr.md", "docs/gates.md", "docs/runs.md")
SEVERAL = [words for engine in ENGINES for words in shown_commands(f"{engine} {TRAIN}", *PAGES)]
LAUNCHES = shown_commands(LAUNCH, *PAGES)


def test_the_commands_are_found() -> None:
    """A search that finds too few would let the next tests pass on nothing."""
    assert (len(TRAININGS), len(EVALUATIONS), len(SEVERAL), len(LAUNCHES), len(SWEEPS)) == (8, 11, 3, 2, 5)


@pytest.mark.parametrize("words", SWEEPS, ids=" ".join)
def test_a_shown_sweep_is_accepted(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m3po_lab.experiments.sweep.run_sweep", lambda *given: 0)
    assert sweep(words) == 0


@pytest.mark.parametrize("words", EVALUATIONS, ids=" ".join)
def test_a_shown_evaluation_is_accepted(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m3po_lab.evaluation.datasets.hub_error", lambda: None)
    given = parser().parse_args(words)
    assert choose(given.dataset, given.num_fewshot)[0]


@pytest.mark.parametrize("words", SEVERAL, ids=" ".join)
def test_a_shown_training_in_several_processes_is_accepted(words: list[str]) -> None:
    assert parse_run(words).training.mode == "m3po"


@pytest.mark.parametrize("words", LAUNCHES, ids=" ".join)
def test_a_shown_launch_is_accepted(words: list[str]) -> None:
    given = launch_command_parser().parse_args(words)
    assert find_config(given.config_file) and (given.module, given.training_script) == (True, "m3po_lab.train")
    assert parse_run(given.training_script_args).training.mode == "m3po"


@pytest.mark.parametrize("words", TRAININGS, ids=" ".join)
def test_a_shown_command_is_accepted(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"question": f"What is {i} + 1?", "answer": f"It is.\n#### {i + 1}"} for i in range(1200)]
    (tmp_path / "my_problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    run: Run = parse_run(words)
    train, held_out = load_problems(run.script)
    assert train and len(held_out) == run.script.num_eval_problems
