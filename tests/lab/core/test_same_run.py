# SPDX-License-Identifier: Apache-2.0
"""One definition of "the same run": a resume as another one is refused by the flag's name, or recorded as it was."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from trl import GRPOConfig, ModelConfig

from m3po_lab.core.files import read_json
from m3po_lab.core.identity import RUN_FILE, WITHOUT_EFFECT, difference
from m3po_lab.grpo.arguments import RunArguments
from m3po_lab.grpo.config import parse_run
from m3po_lab.grpo.identity import of_run, parts_of, schedule_parts
from m3po_lab.grpo.resume import checkpoint_to_resume
from m3po_lab.train import main


def flags_of(config: Path, *words: str) -> dict[str, Any]:
    return of_run(parse_run([str(config), *words], idle=True))


@pytest.fixture
def run_folder(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--learning_rate", "1e-3"], "--learning_rate 0.001: checkpoint-6 was trained with 0.01; set that, or"),
        (["--lr_scheduler_type", "cosine"], "--lr_scheduler_type cosine: checkpoint-6 was trained with constant"),
        (["--seed", "4"], "--seed 4: checkpoint-6 was trained with 3"),
        (["--prompt_template", "{expression} ?"], "--prompt_template {expression} ?: checkpoint-6 was trained with W"),
        (["--dataset", "reasoning-gym:leg_counting"], "--dataset reasoning-gym:leg_counting: checkpoint-6 was trained"),
        (["--problem_seed", "8"], "--problem_seed 8: checkpoint-6 was trained with 7"),
        (["--reward_weights", "1.0", "0.5"], "--reward_weights [1.0, 0.5]: checkpoint-6 was trained with [1.0, 0.25]"),
        (["--beta", "0.1"], "--beta 0.1: checkpoint-6 was trained with 0.0"),
        (["--max_steps", "4"], "--max_steps 4: checkpoint-6 is beyond it; set 6 or more."),
    ],
)
def test_another_run_is_not_resumed(
    words: list[str], line: str, run_folder: Path, tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")}
    given = [str(tiny_config), *words, "--output_dir", str(run_folder), "--resume_from_checkpoint=true"]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")} == before


def test_a_file_counts_by_its_content_and_not_by_its_name(tiny_config: Path, tiny_model: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    for file in (one, other):
        file.write_text('{"question": "What is 1 + 1 ?", "answer": "#### 2"}\n')
    known = flags_of(tiny_config, "--dataset", str(one))
    assert difference(known, flags_of(tiny_config, "--dataset", str(other))) is None
    one.write_text('{"question": "What is 1 + 1 ?", "answer": "#### 3"}\n')
    found = difference(known, flags_of(tiny_config, "--dataset", str(one)))
    assert found is not None and found[0] == "dataset" and found[2].startswith(f"{one} (sha256 ")
    moved = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    known = flags_of(tiny_config)
    assert difference(known, flags_of(tiny_config, "--model_name_or_path", str(moved))) is None
    weights = moved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    found = difference(known, flags_of(tiny_config, "--model_name_or_path", str(moved)))
    assert found is not None and found[0] == "model_name_or_path"


def test_flags_that_change_nothing_are_no_difference(run_folder: Path, tiny_config: Path) -> None:
    words = ["--save_steps", "6", "--save_total_limit", "1", "--report_to", "tensorboard", "--overwrite", "true"]
    words += ["--dataloader_num_workers", "1", "--disable_tqdm", "true", "--cross_path_lambda", "0.3"]  # mode is none
    words += ["--output_dir", str(run_folder), "--resume_from_checkpoint", "true"]
    run = parse_run([str(tiny_config), *words], idle=True)
    assert checkpoint_to_resume(run, of_run(run)) == run_folder / "checkpoint-6"
    assert difference(flags_of(tiny_config), of_run(run)) is None
    known = {entry.name for kind in (RunArguments, GRPOConfig, ModelConfig) for entry in dataclasses.fields(kind)}
    assert {name for names in WITHOUT_EFFECT.values() for name in names} <= known


@pytest.mark.parametrize(
    ("one", "other", "flag"),
    [
        (["--mode", "m3po"], ["--mode", "m3po", "--cross_path_temp", "0.1"], None),
        (["--mode", "m3po"], ["--mode", "m3po", "--gating_config", '{"temperature": 0.1}'], None),
        (["--mode", "m3po"], ["--mode", "m3po", "--cross_path_lambda", "0.3"], "cross_path_lambda"),
        (["--mode", "m3po"], ["--mode", "none", "--cross_path_lambda", "0.3"], "mode"),
        (["--mode", "m3po"], ["--mode", "m3po", "--gating_type", "raw_dot"], "gating_type"),
        (["--mode", "m3po"], ["--mode", "m3po", "--gating_config", "{}"], None),
        (["--mode", "hrpo"], ["--mode", "hrpo", "--cross_path_lambda", "0.3"], None),
        (["--mode", "hrpo"], ["--mode", "hrpo", "--cross_path_phase", "all"], "cross_path_phase"),
        (["--mode", "hrpo"], ["--mode", "hrpo", "--thinking_residual_gate_learning_rate", "1"], "thinking_residual_"),
        (["--mode", "none"], ["--mode", "none", "--aslr_enabled", "true"], "aslr_enabled"),
        (["--mode", "none"], ["--mode", "none", "--aslr_enabled", "false"], None),
    ],
)
def test_a_flag_counts_where_the_run_has_it(one: list[str], other: list[str], flag: str | None) -> None:
    config = Path("configs/demo_short.yaml")
    found = difference(flags_of(config, *one), flags_of(config, *other))
    assert found is None if flag is None else found is not None and found[0].startswith(flag)


def test_what_held_from_which_step_on_is_kept() -> None:
    first = {"lr_scheduler_type": "linear", "max_steps": 24, "per_device_eval_batch_size": 100}
    parts = parts_of(None, first, 0)
    assert parts == [{"from_step": 0, "max_steps": 24, "per_device_eval_batch_size": 100}]
    assert schedule_parts(first, parts) == []
    assert parts_of({"parts": parts}, first, 12) == parts  # stopped and resumed is no other run
    smaller = parts_of({"parts": parts}, {**first, "per_device_eval_batch_size": 10}, 12)
    assert len(smaller) == 2 and schedule_parts(first, smaller) == []
    longer = parts_of({"parts": smaller}, {**first, "max_steps": 48}, 24)
    assert [part["from_step"] for part in longer] == [0, 12, 24]
    assert schedule_parts(first, longer) == [[0, 24], [24, 48]]  # a linear rate begins at its half again
    assert schedule_parts({**first, "lr_scheduler_type": "constant"}, longer) == []
    assert [part["from_step"] for part in parts_of({"parts": longer}, first, 12)] == [0]  # back to the first
    assert schedule_parts(first, parts_of(None, first, 24)) == [[24, 24]]  # the past is not known


def test_a_run_without_run_json_is_resumed_and_says_what_could_not_be_compared(
    run_folder: Path, tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in run_folder.rglob(RUN_FILE):
        file.unlink()
    words = [str(tiny_config), "--output_dir", str(run_folder), "--resume_from_checkpoint", "true"]
    assert main(words) == 0
    assert "checkpoint-6 has no run.json: it is resumed as what its m3po.json says" in capsys.readouterr().out
    assert main([*words, "--learning_rate", "1e-3"]) == 2  # the folder has it now


def test_every_run_and_checkpoint_says_what_it_is_and_nothing_secret(finished_run: Path, tiny_config: Path) -> None:
    files = {path.parent.name: json.loads(path.read_text()) for path in finished_run.rglob(RUN_FILE)}
    assert sorted(files) == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "uninterrupted"]
    assert all(content == files["checkpoint-2"] for content in files.values())
    summary = read_json(finished_run / "summary.json") or {}
    assert summary["flags"].items() >= {"learning_rate": 0.01, "seed": 3, "max_steps": 6}.items()
    assert summary["parts"] == files["checkpoint-2"]["parts"] and len(summary["parts"]) == 1
    assert "hub_token" not in flags_of(tiny_config, "--hub_token", "hf_x")


def test_a_report_is_not_written_over(finished_run: Path, tiny_config: Path, tmp_path: Path, capsys: Any) -> None:
    """A run that keeps no checkpoints leaves its report all the same."""
    shutil.copy(finished_run / "summary.json", tmp_path / "summary.json")
    words = [str(tiny_config), "--output_dir", str(tmp_path)]
    assert main([*words, "--save_strategy", "no"]) == 2
    assert main([*words, "--resume_from_checkpoint", str(finished_run / "checkpoint-2")]) == 2  # a branch, likewise
    assert capsys.readouterr().err.count("already has the report of a run, summary.json: start anew with another") == 2
    assert (tmp_path / "summary.json").read_text() == (finished_run / "summary.json").read_text()
