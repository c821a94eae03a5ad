# SPDX-License-Identifier: Apache-2.0
"""What a run may do with a run folder that has checkpoints: go on from one of its own, or start anew."""

import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.m3po import read_checkpoint_info
from transformers.m3po.aslr.settings import ASLR_HYPERPARAMETERS
from trl.trainer.m3po.config import RESIDUAL_GATE_START, checkpoint_info

from m3po_lab.core.errors import ERROR_LOG, UserError
from m3po_lab.core.identity import RUN_FILE, difference, read_run
from m3po_lab.grpo.arguments import Run
from m3po_lab.grpo.checkpoints import checkpoints, engine_of, missing_part, step_of, written_by
from m3po_lab.grpo.identity import MAY_CHANGE

DESCRIPTION = ("debug", "versions")  # what m3po.json says that does not change a run
OF_ASLR = ("aslr_enabled", *ASLR_HYPERPARAMETERS)  # left out of m3po.json without ASLR
OF_MODEL = (*RESIDUAL_GATE_START, *OF_ASLR)  # a model that has them says them
OWN_FILES = ("baseline.json", RUN_FILE, "summary.json", "reward.png", "completions.jsonl", "samples.jsonl", ERROR_LOG)


def checkpoint_to_resume(run: Run, flags: Mapping[str, Any]) -> Path | None:
    """The checkpoint a run starts from, None for a new run. It looks only, so that several processes see the same.

    ``--resume_from_checkpoint true`` means the newest whole one; a path means that one.

    Args:
        flags: what defines the run (`identity.of_run`).

    Raises:
        UserError: when there is none, when the named one is not whole or of another run, or when later ones of the
            same run are in the way.
    """
    folder, flag = run.folder, run.training.resume_from_checkpoint
    if flag is None or str(flag).lower() in ("false", "no"):
        return None
    if str(flag).lower() in ("true", "yes", "last"):
        whole = [path for path in checkpoints(folder) if missing_part(path) is None]
        if not whole:
            raise UserError(
                f"--resume_from_checkpoint true: {folder} has no whole checkpoint; leave the flag out to start anew."
            )
        chosen = whole[-1]
    else:
        chosen = Path(str(flag))
        part = missing_part(chosen) if chosen.is_dir() else "the folder"
        if part is not None:
            raise UserError(f"--resume_from_checkpoint {flag} cannot be resumed: {part} is missing or cut short.")
    later = [path for path in checkpoints(folder) if step_of(path) > step_of(chosen)]
    in_the_way = [path.name for path in later if missing_part(path) is None]
    if in_the_way:
        raise UserError(
            f"--resume_from_checkpoint {flag}: {folder} already has {in_the_way[-1]}, which is later; resume that one "
            "('true'), or give another --output_dir for the new branch."
        )
    check_same_run(chosen, run, flags)
    return chosen


def check_same_run(checkpoint: Path, run: Run, flags: Mapping[str, Any], settled: bool = False) -> None:
    """Refuse to resume a checkpoint as another run than the one that wrote it.

    Args:
        flags: what defines the run (`identity.of_run`).
        settled: the trainer has been made, so that `run.training` says what the start model's residual gate began with,
            if that model has one, and what ASLR it has. Before, this is not compared.

    Raises:
        UserError: for the first flag that differs; it names both values.
    """
    training, engine = run.training, run.engine.name
    anew = f"start a new run from it with --model_name_or_path {shlex.quote(str(checkpoint))} and another --output_dir."
    if written_by(checkpoint) != training.world_size:
        raise UserError(
            f"{checkpoint.name} was written by {counted(written_by(checkpoint))} and this run has "
            f"{training.world_size}, whose batches would be others; start as many, or {anew}"
        )
    if engine_of(checkpoint) != engine:
        raise UserError(
            f"{checkpoint.name} was written by a run with --engine {engine_of(checkpoint)}, and this one has {engine}, "
            f"which rounds otherwise; set --engine {engine_of(checkpoint)}, or {anew}"
        )
    if 0 < training.max_steps < step_of(checkpoint):
        raise UserError(
            f"--max_steps {training.max_steps}: {checkpoint.name} is beyond it; set {step_of(checkpoint)} or more."
        )
    recorded = read_run(checkpoint)
    differing = difference(recorded["flags"], flags, (*MAY_CHANGE, *OF_MODEL)) if recorded else None
    if differing is not None:
        name, stored, now = differing
        raise UserError(f"--{name} {now}: {checkpoint.name} was trained with {stored}; set that, or {anew}")
    saved = read_checkpoint_info(checkpoint)
    running = checkpoint_info(training)
    for name in [*running, *(name for name in OF_ASLR if name in saved and name not in running)]:
        now = running.get(name)
        if name not in DESCRIPTION and (settled or name not in OF_MODEL) and saved.get(name) != now:
            flag = {"sampling_temperature": "temperature"}.get(name, name)
            raise UserError(
                f"--{flag} {now}: {checkpoint.name} was trained with {saved.get(name)}; set that, or {anew}"
            )


def claim_run_folder(run: Run, flags: Mapping[str, Any]) -> Path | None:
    """Make the run folder this run's, and return the checkpoint it starts from (None: from the start).

    Half-written checkpoints behind that one are removed; of a new run with `overwrite`, all that an old one wrote. The
    processes of a run come here together: all have looked before the first one deletes, and all wait until it has.

    Raises:
        UserError: as `checkpoint_to_resume`, or when a new run finds checkpoints, or a new run or branch the report of
            another, and `overwrite` is not set; nothing is touched then.
    """
    folder, training, overwrite = run.folder, run.training, run.script.overwrite
    chosen = checkpoint_to_resume(run, flags)
    existing = checkpoints(folder)
    if chosen is None and existing and not overwrite:
        raise UserError(
            f"{folder} already has {existing[-1].name}: continue it with --resume_from_checkpoint true, or start anew "
            "with another --output_dir (or --overwrite true, which deletes it)."
        )
    begins = chosen is None or chosen.parent.resolve() != folder.resolve()  # here, from wherever
    if begins and (folder / "summary.json").exists() and not overwrite:
        raise UserError(
            f"{folder} already has the report of a run, summary.json: start anew with another --output_dir (or "
            "--overwrite true, which deletes it)."
        )
    training.distributed_state.wait_for_everyone()
    if training.process_index == 0:
        for path in existing:
            if chosen is None or step_of(path) > step_of(chosen):
                shutil.rmtree(path)
        for name in OWN_FILES if chosen is None and overwrite else ():
            (folder / name).unlink(missing_ok=True)
        if chosen is not None and read_run(chosen) is None:
            print(
                f"{chosen.name} has no {RUN_FILE}: it is resumed as what its m3po.json says; whether the other flags, "
                "the dataset and the start model are those it was trained with could not be compared"
            )
    training.distributed_state.wait_for_everyone()
    return chosen


def counted(number: int) -> str:
    """A number of processes in words."""
    return f"{number} process{'' if number == 1 else 'es'}"
