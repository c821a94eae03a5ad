# SPDX-License-Identifier: Apache-2.0
"""Run folders: nothing is mixed or lost, half-written checkpoints are never resumed, the save schedule is checked."""

import json
import shutil
from pathlib import Path

import pytest
from trl import GRPOConfig, ModelConfig
from trl.trainer.m3po.config import checkpoint_info

from m3po_lab.core.errors import UserError
from m3po_lab.core.identity import RUN_FILE
from m3po_lab.grpo import checkpoints, resume
from m3po_lab.grpo.arguments import Run, RunArguments
from m3po_lab.grpo.engine import TRL


def arguments(folder: Path, **changes: object) -> GRPOConfig:
    settings = {"output_dir": str(folder), "use_cpu": True, "bf16": False, "save_steps": 2, "max_steps": 6, "seed": 3}
    return GRPOConfig(**{**settings, **changes})


def resumed(training: GRPOConfig) -> Path | None:
    run = Run(RunArguments(), training, ModelConfig(), Path("x.yaml"), TRL)
    return resume.checkpoint_to_resume(run, {})


def claimed(training: GRPOConfig, overwrite: bool = False) -> Path | None:
    run = Run(RunArguments(overwrite=overwrite), training, ModelConfig(), Path("x.yaml"), TRL)
    return resume.claim_run_folder(run, {})


@pytest.fixture
def run_folder(finished_run: Path, tmp_path: Path) -> Path:
    """A finished run of which nothing but `m3po.json` says what it was."""
    folder = Path(shutil.copytree(finished_run, tmp_path / "copy"))
    for file in folder.rglob(RUN_FILE):
        file.unlink()
    return folder


@pytest.mark.parametrize(
    ("steps_per_generation", "num_iterations", "accumulation", "cycle"),
    [(1, 1, 1, 1), (4, 1, 4, 1), (4, 1, 2, 2), (1, 3, 1, 3), (4, 2, 4, 2), (2, 3, 4, 3), (6, 1, 4, 3), (2, 1, 8, 1)],
)
def test_generation_cycle_ends_where_completions_and_gradients_do(
    tmp_path: Path, steps_per_generation: int, num_iterations: int, accumulation: int, cycle: int
) -> None:
    training = arguments(
        tmp_path,
        steps_per_generation=steps_per_generation,
        num_iterations=num_iterations,
        gradient_accumulation_steps=accumulation,
    )
    assert checkpoints.generation_cycle(training) == cycle
    generate_every = steps_per_generation * num_iterations
    fresh = [step for step in range(1, 50) if step * accumulation % generate_every == 0]
    assert fresh[0] == cycle


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"save_steps": 3}, "--save_steps 3: it must be a multiple of the generation cycle, here 2 steps .*set 4"),
        ({"save_steps": 0.5}, "--save_steps 0.5: it must be a multiple"),
        ({"max_steps": 7}, "--max_steps 7: it must be a multiple .*set 8"),
    ],
)
def test_checkpoint_within_a_generation_cycle_is_refused(tmp_path: Path, changes: dict[str, object], text: str) -> None:
    with pytest.raises(UserError, match=text):
        checkpoints.check_save_steps(arguments(tmp_path, num_iterations=2, **changes))


def test_checkpoints_without_an_optimizer_are_refused(tmp_path: Path) -> None:
    """A run resumed from one would go on from other weights than the uninterrupted one, without a word."""
    with pytest.raises(UserError, match="--save_only_model true: .*set false"):
        checkpoints.check_save_steps(arguments(tmp_path, save_only_model=True))


def test_schedule_is_free_where_nothing_is_saved(tmp_path: Path) -> None:
    checkpoints.check_save_steps(arguments(tmp_path, num_iterations=2, max_steps=7, save_strategy="no"))
    checkpoints.check_save_steps(arguments(tmp_path, num_iterations=2, max_steps=6))


def test_folder_with_checkpoints_is_refused_and_untouched(run_folder: Path) -> None:
    before = sorted(path.relative_to(run_folder) for path in run_folder.rglob("*"))
    with pytest.raises(UserError, match="--resume_from_checkpoint true, or start anew .*--output_dir .*--overwrite"):
        claimed(arguments(run_folder))
    assert sorted(path.relative_to(run_folder) for path in run_folder.rglob("*")) == before


def test_overwrite_deletes_what_a_run_wrote_and_nothing_else(run_folder: Path) -> None:
    (run_folder / "my notes.txt").write_text("keep")
    assert claimed(arguments(run_folder), overwrite=True) is None
    assert checkpoints.checkpoints(run_folder) == []
    assert not (run_folder / "summary.json").exists()
    assert (run_folder / "my notes.txt").read_text() == "keep"


def test_newest_whole_checkpoint_is_resumed(run_folder: Path) -> None:
    chosen = resumed(arguments(run_folder, resume_from_checkpoint="true"))
    assert chosen == run_folder / "checkpoint-6"
    assert resumed(arguments(run_folder)) is None


def test_steps_are_compared_as_numbers(tmp_path: Path) -> None:
    for step in (8, 10, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    found = checkpoints.checkpoints(tmp_path)
    assert [path.name for path in found] == ["checkpoint-8", "checkpoint-9", "checkpoint-10"]


@pytest.mark.parametrize(
    "name", ["trainer_state.json", "m3po.json", "optimizer.pt", "rng_state.pth", "model.safetensors"]
)
@pytest.mark.parametrize("share", [0, 0.9])
def test_checkpoint_cut_short_is_not_resumed_but_removed(run_folder: Path, name: str, share: float) -> None:
    file = run_folder / "checkpoint-6" / name
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    assert checkpoints.missing_part(run_folder / "checkpoint-6") == name
    chosen = claimed(arguments(run_folder, resume_from_checkpoint="true"))
    assert chosen == run_folder / "checkpoint-4"
    assert [path.name for path in checkpoints.checkpoints(run_folder)] == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize("name", ["trainer_state.json", "m3po.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_checkpoint_without_its_state_is_not_resumed(run_folder: Path, name: str) -> None:
    (run_folder / "checkpoint-6" / name).unlink()
    with pytest.raises(UserError, match=f"cannot be resumed: {name.split('.p')[0]} ?.*missing"):
        resumed(arguments(run_folder, resume_from_checkpoint=str(run_folder / "checkpoint-6")))


def test_resume_without_any_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no whole checkpoint"):
        resumed(arguments(tmp_path, resume_from_checkpoint="true"))


def test_earlier_checkpoint_is_refused_while_later_ones_are_in_the_way(run_folder: Path, tmp_path: Path) -> None:
    """Else the branch would overwrite checkpoint-4 file by file, and a kill would leave a mixture of two runs."""
    earlier = str(run_folder / "checkpoint-2")
    with pytest.raises(UserError, match="already has checkpoint-6, which is later"):
        resumed(arguments(run_folder, resume_from_checkpoint=earlier))
    branch = arguments(tmp_path / "branch", resume_from_checkpoint=earlier)
    assert resumed(branch) == run_folder / "checkpoint-2"


def test_checkpoint_of_another_number_of_processes_is_refused(run_folder: Path) -> None:
    """Each process draws from its own random state, and the last of them may be written after all else."""
    checkpoint = run_folder / "checkpoint-6"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["stateful_callbacks"]["TrainingClock"]["attributes"]["processes"] = 2
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    assert checkpoints.missing_part(checkpoint) == "rng_state_1.pth"
    shutil.copy(checkpoint / "rng_state_0.pth", checkpoint / "rng_state_1.pth")
    assert checkpoints.missing_part(checkpoint) is None
    with pytest.raises(UserError, match="checkpoint-6 was written by 2 processes and this run has 1"):
        resumed(arguments(run_folder, resume_from_checkpoint="true"))


def test_checkpoint_of_another_mode_is_refused(run_folder: Path) -> None:
    file = run_folder / "checkpoint-6" / "m3po.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "mode": "m3po", "cross_path_lambda": 0.2}))
    with pytest.raises(UserError, match="--mode none: checkpoint-6 was trained with m3po"):
        resumed(arguments(run_folder, resume_from_checkpoint="true"))
    with pytest.raises(UserError, match="--cross_path_lambda 0.1: checkpoint-6 was trained with 0.2"):
        resumed(arguments(run_folder, resume_from_checkpoint="true", mode="m3po"))


@pytest.mark.parametrize(
    ("stored", "text"),
    [
        ({"sampling_temperature": 0.7}, "--temperature 1.0: checkpoint-6 was trained with 0.7"),
        ({"cross_path_temp": 0.5}, "--cross_path_temp 0.1: checkpoint-6 was trained with 0.5"),
        ({"cross_path_top_k": 2}, "--cross_path_top_k None: checkpoint-6 was trained with 2"),
        ({"answer_start": "A:"}, "--answer_start ####: checkpoint-6 was trained with A:"),
        ({"debug": True, "versions": {}}, None),
    ],
)
def test_a_number_left_to_its_default_contradicts_the_checkpoint_too(
    run_folder: Path, stored: dict[str, object], text: str | None
) -> None:
    training = arguments(run_folder, resume_from_checkpoint="true", mode="m3po")
    (run_folder / "checkpoint-6" / "m3po.json").write_text(json.dumps({**checkpoint_info(training), **stored}))
    if text is None:
        assert resumed(training) == run_folder / "checkpoint-6"
        return
    with pytest.raises(UserError, match=text):
        resumed(training)
