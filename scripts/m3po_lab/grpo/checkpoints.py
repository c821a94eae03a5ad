# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints of a run folder can be resumed, and what a run may do with a folder that has some.

TRL does not checkpoint the completions it has generated and not yet trained on. A checkpoint therefore has to lie at
the end of a generation cycle, or the resumed run would generate other ones than the uninterrupted run has used.

The Trainer writes `trainer_state.json` after everything else it needs to resume, so a checkpoint that has it is whole
as far as the process is concerned. Files cut short in it (the machine went down) are found by their own formats: a zip
archive ends in its directory, a safetensors header says the length.
"""

import math
import re
import shlex
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.m3po import read_checkpoint_info
from transformers.m3po.aslr.settings import ASLR_HYPERPARAMETERS
from transformers.m3po.modules import ADDED_MODULES
from trl import GRPOConfig
from trl.trainer.m3po.config import RESIDUAL_GATE_START, checkpoint_info

from m3po_lab.core.errors import ERROR_LOG, UserError
from m3po_lab.core.files import read_json
from m3po_lab.core.identity import RUN_FILE, difference, read_run
from m3po_lab.grpo.arguments import Run
from m3po_lab.grpo.identity import MAY_CHANGE

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
NEEDED = ("m3po.json", "trainer_state.json")
STATES = ("optimizer", "scheduler")  # files or folders whose names begin so, whatever the engine
DESCRIPTION = ("debug", "versions")  # what m3po.json says that does not change a run
OF_ASLR = ("aslr_enabled", *ASLR_HYPERPARAMETERS)  # left out of m3po.json without ASLR
OF_MODEL = (*RESIDUAL_GATE_START, *OF_ASLR)  # a model that has them says them
OWN_FILES = ("baseline.json", RUN_FILE, "summary.json", "reward.png", "completions.jsonl", ERROR_LOG)


def generation_cycle(training: GRPOConfig) -> int:
    """Optimizer steps after which the buffered completions are used up and a step boundary falls on fresh ones.

    Completions are generated every ``steps_per_generation * num_iterations`` micro-steps; an optimizer step takes
    ``gradient_accumulation_steps`` of them.
    """
    micro_steps = training.steps_per_generation * training.num_iterations
    return micro_steps // math.gcd(micro_steps, training.gradient_accumulation_steps)


def check_save_steps(training: GRPOConfig) -> None:
    """Refuse a checkpoint schedule that cannot be resumed exactly.

    Raises:
        UserError: when `save_steps`, or `max_steps` at which the last checkpoint is written, is no multiple of the
            generation cycle.
    """
    if training.save_strategy == "no":
        return
    if training.save_only_model:
        raise UserError("--save_only_model true: such checkpoints lack the optimizer and cannot be resumed; set false.")
    cycle = generation_cycle(training)
    checked = {"max_steps": training.max_steps} if training.max_steps > 0 else {}
    if training.save_strategy == "steps":
        checked["save_steps"] = training.save_steps
    for flag, steps in checked.items():
        if steps != int(steps) or int(steps) % cycle:
            above = max(cycle, math.ceil(steps / cycle) * cycle)
            raise UserError(
                f"--{flag} {steps}: it must be a multiple of the generation cycle, here {cycle} steps "
                "(steps_per_generation * num_iterations / gradient_accumulation_steps), since the completions in "
                f"between are not part of a checkpoint; set {above}."
            )


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders in a run folder by step, whole or not."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer step in a checkpoint folder's name."""
    match = CHECKPOINT.fullmatch(checkpoint.name)
    if match is None:
        raise UserError(f"--resume_from_checkpoint {checkpoint}: the folder's name is not checkpoint-<step>.")
    return int(match.group(1))


def missing_part(checkpoint: Path) -> str | None:
    """The first file that is missing or cut short in a checkpoint, None when it is whole."""
    for name in NEEDED:
        content = read_json(checkpoint / name)
        if content is None:
            return name
        if name == "trainer_state.json" and content.get("global_step") != step_of(checkpoint):
            return name
    for name in random_states(checkpoint):
        if not (checkpoint / name).is_file():
            return name
    for state in STATES:
        if not any(checkpoint.glob(f"{state}*")) and not any(checkpoint.glob("global_step*")):  # DeepSpeed's folder
            return state
    for archive in [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]:
        if not zipfile.is_zipfile(archive):
            return archive.name
    keys: list[str] = []
    for weights in checkpoint.glob("*.safetensors"):
        try:
            with safe_open(weights, framework="pt") as content:
                keys += content.keys()
        except (SafetensorError, OSError):
            return weights.name
    return missing_module(checkpoint, keys) if keys else None  # other engines have files of their own


def missing_module(checkpoint: Path, keys: list[str]) -> str | None:
    """The first parameter of a module that `m3po.json` speaks of and that is not among the weights."""
    hyperparameters = read_json(checkpoint / "m3po.json") or {}
    for modules in ADDED_MODULES:
        for name in modules.parameters(hyperparameters) if modules.belongs(hyperparameters) else ():
            if not any(key.endswith(f".{name}") for key in keys):
                return name
    return None


def random_states(checkpoint: Path) -> list[str]:
    """The files with the states of the random generators, one a process; another one's may come after all else."""
    number = written_by(checkpoint)
    return ["rng_state.pth"] if number == 1 else [f"rng_state_{index}.pth" for index in range(number)]


def written_by(checkpoint: Path) -> int:
    """The number of processes of the run that wrote a checkpoint."""
    callbacks = (read_json(checkpoint / "trainer_state.json") or {}).get("stateful_callbacks", {})
    return int(callbacks.get("TrainingClock", {}).get("attributes", {}).get("processes", 1))


def engine_of(checkpoint: Path) -> str:
    """The engine of the run that wrote a checkpoint; before there was a choice it was TRL."""
    callbacks = (read_json(checkpoint / "trainer_state.json") or {}).get("stateful_callbacks", {})
    return str(callbacks.get("TrainingClock", {}).get("attributes", {}).get("engine", "trl"))


def counted(number: int) -> str:
    """A number of processes in words."""
    return f"{number} process{'' if number == 1 else 'es'}"


def checkpoint_to_resume(run: Run, flags: Mapping[str, Any]) -> Path | None:
    """The checkpoint a run starts from, None for a new run. It looks only, so that several processes see the same.

    ``--resume_from_checkpoint true`` means the newest whole one; a path means that one.

    Args:
        flags: what defines the run (`identity.of_run`).

    Raises:
        UserError: when there is none, when the named one is not whole or of another run, or when later ones of the
            same run are in the way.
    """
    folder, asked = run.folder, run.training.resume_from_checkpoint
    if asked is None or str(asked).lower() in ("false", "no"):
        return None
    if str(asked).lower() in ("true", "yes", "last"):
        whole = [path for path in checkpoints(folder) if missing_part(path) is None]
        if not whole:
            raise UserError(
                f"--resume_from_checkpoint true: {folder} has no whole checkpoint; leave the flag out to start anew."
            )
        chosen = whole[-1]
    else:
        chosen = Path(str(asked))
        part = missing_part(chosen) if chosen.is_dir() else "the folder"
        if part is not None:
            raise UserError(f"--resume_from_checkpoint {asked} cannot be resumed: {part} is missing or cut short.")
    later = [path for path in checkpoints(folder) if step_of(path) > step_of(chosen)]
    in_the_way = [path.name for path in later if missing_part(path) is None]
    if in_the_way:
        raise UserError(
            f"--resume_from_checkpoint {asked}: {folder} already has {in_the_way[-1]}, which is later; resume that one "
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
    told = read_run(checkpoint)
    differing = difference(told["flags"], flags, (*MAY_CHANGE, *OF_MODEL)) if told else None
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
    found = checkpoints(folder)
    if chosen is None and found and not overwrite:
        raise UserError(
            f"{folder} already has {found[-1].name}: continue it with --resume_from_checkpoint true, or start anew "
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
        for path in found:
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
