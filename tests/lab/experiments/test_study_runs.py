# SPDX-License-Identifier: Apache-2.0
"""How the runs of a study are started. GPUs cannot exist here, so that what starts a run is a stand-in in this file."""

import os
import threading
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any

import pytest

from m3po_lab.core.files import read_json, write_json
from m3po_lab.study import runs as study_runs
from m3po_lab.study.plan import StudyRun
from m3po_lab.study.runs import LOG_FILE, TIMES_FILE, cost_line, environments, run_study

RUNS = [StudyRun("none", seed, f"none-seed{seed}", ["base.yaml", f"--seed={seed}"], {}) for seed in range(5)]


class Started:
    """In place of `subprocess.run`: writes a summary and remembers what it was given; two wait for each other."""

    def __init__(self, codes: dict[str, int] | None = None, together: int = 1) -> None:
        self.codes, self.commands, self.own = codes or {}, [], []
        self.meet = threading.Barrier(together)

    def run(self, command: list[str], env: dict[str, str], stdout: Any, stderr: Any, check: bool) -> Any:
        folder = Path(command[command.index("--output_dir") + 1])
        self.commands.append(command)
        self.own.append({name: value for name, value in env.items() if os.environ.get(name) != value})
        if len(self.own) <= self.meet.parties:
            self.meet.wait(timeout=20)
        code = self.codes.get(folder.name, 0)
        if stdout is not None:
            stdout.write(f"{folder.name} speaks\n")
        if code == 0:
            write_json(folder / "summary.json", {"accuracy_after": 0.5})
        return CompletedProcess(command, code)


def start(monkeypatch: pytest.MonkeyPatch, started: Started, gpus: list[str]) -> Started:
    monkeypatch.setattr(study_runs, "subprocess", SimpleNamespace(run=started.run))
    monkeypatch.setattr(study_runs, "gpus", lambda: gpus)
    return started


def test_one_run_on_each_gpu_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any):
    started = start(monkeypatch, Started(together=2), ["0", "3"])
    assert run_study(RUNS, tmp_path, jobs=2) == 0
    assert {own["CUDA_VISIBLE_DEVICES"] for own in started.own[:2]} == {"0", "3"} and len(started.own) == 5
    assert (tmp_path / "none-seed4" / LOG_FILE).read_text() == "none-seed4 speaks\n"
    assert set(read_json(tmp_path / TIMES_FILE) or {}) == {run.name for run in RUNS}
    printed = capsys.readouterr().out
    assert "run 5 of 5: none, seed 4" in printed and "5 of 5 runs done" in printed


def test_without_a_gpu_runs_at_once_share_the_cores():
    cores = len(os.sched_getaffinity(0))
    assert environments(1, []) == [{}]
    assert environments(2, []) == [{"OMP_NUM_THREADS": str(max(1, cores // 2))}] * 2


def test_a_run_that_fails_ends_the_study_with_its_code_and_the_next_call_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
):
    started = start(monkeypatch, Started({"none-seed1": 3}), [])
    assert run_study(RUNS, tmp_path, jobs=1) == 3
    assert len(started.commands) == 2 and "none-seed1 ended with exit code 3" in capsys.readouterr().err
    assert "5 runs, 1 of them done; about 0 min each" in cost_line(RUNS, tmp_path, [], 1)
    again = start(monkeypatch, Started(), [])
    assert run_study(RUNS, tmp_path, jobs=1) == 0
    assert [command[3:5] for command in again.commands] == [run.words for run in RUNS[1:]]
    assert cost_line(RUNS, tmp_path, [], 1) == "5 runs, 5 of them done"


def test_a_run_of_which_only_the_summary_was_kept_is_not_run_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    write_json(tmp_path / "none-seed1.json", {"accuracy_after": 0.5})
    assert cost_line(RUNS, tmp_path, [], 1).startswith("5 runs, 1 of them done")
    started = start(monkeypatch, Started(), [])
    assert run_study(RUNS, tmp_path, jobs=1) == 0
    assert [command[3:5] for command in started.commands] == [run.words for run in RUNS if run.seed != 1]


def test_what_a_study_costs_is_known_from_pilots(tmp_path: Path):
    pilots = [{"train_seconds": 300.0}, {"train_seconds": 420.0}]
    assert cost_line(RUNS, tmp_path, pilots, 1).endswith("about 6 min each, 30 min for what is left")
    assert cost_line(RUNS, tmp_path, pilots, 2).endswith("15 min for what is left")
