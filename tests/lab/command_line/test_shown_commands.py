# SPDX-License-Identifier: Apache-2.0
"""A command that is shown runs when it is pasted: from the caller's folder, whatever the paths are called."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hostile import hostile_folder

from m3po_lab import pretrain_pair, sweep, train
from m3po_lab.command_line.commands import CONTINUE, shown_command, without_flags
from m3po_lab.core.errors import PROJECT_ROOT
from m3po_lab.grpo.config import parse_run
from m3po_lab.grpo.identity import of_run
from m3po_lab.grpo.report import closing_lines, split_gain
from m3po_lab.grpo.resume import checkpoint_to_resume, claim_run_folder

ODD = "Jo's rüns & more"


def interrupted(*words: object) -> None:
    raise KeyboardInterrupt


def pasted(command: str, script: str) -> list[str]:
    """The words for a script that a shell in the current folder finds in a command."""
    start, place, *words = shlex.split(command)
    assert start == "bash" and Path(place).resolve() == PROJECT_ROOT / script
    return words


@pytest.mark.parametrize(
    ("words", "left"),
    [
        (["x.yaml", "--overwrite", "--seed", "1"], ["x.yaml", "--seed", "1"]),
        (["--overwrite", "true", "--seed", "1"], ["--seed", "1"]),
        (["--seed", "1", "--overwrite=true"], ["--seed", "1"]),
        (["--resume-from-checkpoint", "a/checkpoint-2", "--max_steps", "-1"], ["--max_steps", "-1"]),
        (["--resume_from_checkpoint=a b", "--overwrite"], []),
        (["--resume_from_checkpointed", "x"], ["--resume_from_checkpointed", "x"]),
    ],
)
def test_a_flag_is_left_out_however_it_is_written(words: list[str], left: list[str]) -> None:
    assert without_flags(words, CONTINUE) == left


def test_the_script_is_found_from_the_callers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT_ROOT)
    assert shown_command("scripts/sweep.sh", ["a b"]) == "bash scripts/sweep.sh 'a b'"
    monkeypatch.chdir(tmp_path)
    assert pasted(shown_command("scripts/sweep.sh", ["a b"]), "scripts/sweep.sh") == ["a b"]


@pytest.mark.parametrize(
    "more",
    [
        ["--overwrite", "true"],
        ["--overwrite"],
        ["--resume_from_checkpoint", "gone/checkpoint-2"],
        ["--resume-from-checkpoint=gone/checkpoint-2", "--overwrite=true"],
        ["--resume_from_checkpoint", "true"],
    ],
)
def test_the_line_after_ctrl_c_goes_on_from_the_newest_checkpoint(
    more: list[str],
    finished_run: Path,
    tiny_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The named checkpoint may be gone by then, or behind later ones; and what there is must not be deleted."""
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(finished_run, tmp_path / ODD)
    monkeypatch.setattr("m3po_lab.grpo.session.run_session", interrupted)
    assert train.main([str(tiny_config), *more, "--output_dir", ODD]) == 130
    line = capsys.readouterr().err.strip()
    assert line.startswith("Stopped. Continue from checkpoint-6 with: ")
    run = parse_run(pasted(line.partition(" with: ")[2], "scripts/train_grpo.sh"))
    assert claim_run_folder(run, of_run(run)) == Path(ODD) / "checkpoint-6"
    assert not run.script.overwrite and (folder / "checkpoint-2").is_dir() and (folder / "summary.json").is_file()


def test_before_the_first_checkpoint_the_run_is_started_again(
    finished_run: Path,
    tiny_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("m3po_lab.grpo.session.run_session", interrupted)
    words = [str(tiny_config), "--output_dir", str(tmp_path / "branch")]
    named = ["--resume_from_checkpoint", str(finished_run / "checkpoint-2")]  # in another folder, where it stays
    assert train.main([*words, *named]) == 130
    command = capsys.readouterr().err.strip().partition("No checkpoint yet. Start again with: ")[2]
    run = parse_run(pasted(command, "scripts/train_grpo.sh"))
    assert checkpoint_to_resume(run, of_run(run)) == finished_run / "checkpoint-2"
    (tmp_path / "branch" / "checkpoint-2").mkdir(parents=True)  # stopped while the first one was written
    assert train.main(words) == 130
    command = capsys.readouterr().err.strip().partition("Start again with: ")[2]
    run = parse_run(pasted(command, "scripts/train_grpo.sh"))
    assert claim_run_folder(run, of_run(run)) is None


def test_the_variable_of_several_processes_is_shown_too(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_CONFIG", "my configs/two.yaml")
    monkeypatch.setattr("m3po_lab.core.processes.check_started", interrupted)
    assert train.main([str(tiny_config)]) == 130
    assert " with: ACCELERATE_CONFIG='my configs/two.yaml' bash " in capsys.readouterr().err


def test_the_lines_at_the_end_of_a_run(
    finished_run: Path, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished_run, tmp_path / ODD)
    words = [str(tiny_config), "--output_dir", ODD, "--overwrite", "true", "--max_steps", "6"]
    run = parse_run([*words, "--report_to", "tensorboard"])
    summary = {"mode": "none", "gating_type": None, "aslr_enabled": True, "steps": 6, "seed": 3}
    summary |= {"train_seconds": 1.0, "seconds_per_step": 1.0, "verdict": "", "sampled": None, "effects": None}
    lines = closing_lines(run, summary, split_gain([], []), words)
    more, curves, aslr = (
        next(x for x in lines if x.startswith(name)) for name in ("train more", "curves", "with ASLR")
    )
    longer = pasted(more.removeprefix("train more"), "scripts/train_grpo.sh")
    assert longer.count("--max_steps") == 1
    run = parse_run(longer)
    assert run.training.max_steps == 12 and not run.script.overwrite
    assert checkpoint_to_resume(run, of_run(run)) == Path(ODD) / "checkpoint-6"
    program, flag, folder = pasted(curves.removeprefix("curves"), "scripts/run.sh")
    assert (program, flag) == ("tensorboard", "--logdir") and Path(folder).is_dir()
    assert Path(pasted(aslr.removeprefix("with ASLR"), "scripts/eval_gsm8k.sh")[0]).is_dir()
    run.training.save_strategy = "no"  # nothing to go on from
    assert not any(line.startswith("train more") for line in closing_lines(run, summary, split_gain([], []), words))


@pytest.mark.parametrize(
    ("command", "inner", "script"),
    [
        (sweep.main, "m3po_lab.experiments.sweep.run_sweep", "scripts/sweep.sh"),
        (pretrain_pair.main, "m3po_lab.experiments.pair.run_pairs", "scripts/train_mhc.sh"),
    ],
)
def test_a_stopped_sweep_or_pair_shows_the_command_to_go_on(
    command: Any,
    inner: str,
    script: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inner, interrupted)
    words = ["--seeds", "0", "1", "--output_dir", ODD]
    assert command(words) == 130
    assert pasted(capsys.readouterr().err.strip().partition("Go on with: ")[2], script) == words


def test_a_shown_command_really_runs_when_a_shell_gets_it_in_a_hostile_folder(
    finished_run: Path, tiny_config: Path, tmp_path: Path
) -> None:
    variables = os.environ | hostile_folder(tmp_path)
    place = tmp_path / "folder"
    shutil.copytree(finished_run, place / ODD)
    config = shutil.copy(tiny_config, place / "my run's.yaml")
    here = os.getcwd()
    os.chdir(place)
    try:
        words = [Path(config).name, "--output_dir", ODD, "--overwrite", "true"]
        command = shown_command("scripts/train_grpo.sh", words, CONTINUE)
    finally:
        os.chdir(here)
    done = subprocess.run(["bash", "-c", command], cwd=place, env=variables, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "from checkpoint-6 into" in done.stdout
    more = next(line for line in done.stdout.splitlines() if line.startswith("train more"))
    assert f"{shlex.quote(ODD)} --resume_from_checkpoint true --max_steps 12" in more
