# SPDX-License-Identifier: Apache-2.0
"""The training commands that the README shows are read by the real parser, and their problems load."""

import json
import re
import shlex
from pathlib import Path

import pytest

from m3po_lab.config import Run, parse_run
from m3po_lab.data import load_problems

ROOT = Path(__file__).resolve().parents[2]
START = "bash scripts/train_grpo.sh"


def shown_commands() -> list[list[str]]:
    """The words after the script's name in every training command of the README's code blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines if line.startswith(START)]
    return [words[len(START.split()) :] for words in found if "--help" not in words]


def test_the_commands_are_found() -> None:
    """A search that finds too few would let the next test pass on nothing."""
    assert len(shown_commands()) == 5


@pytest.mark.parametrize("words", shown_commands(), ids=" ".join)
def test_a_shown_command_is_accepted(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"question": f"What is {i} + 1?", "answer": f"It is.\n#### {i + 1}"} for i in range(1200)]
    (tmp_path / "my_problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    run: Run = parse_run(words)
    train, held_out = load_problems(run.script)
    assert train and len(held_out) == run.script.num_eval_problems
