# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints of a run folder can be resumed: those that are whole, at the end of a generation cycle.

TRL does not checkpoint the completions it has generated and not yet trained on. A checkpoint therefore has to lie at
the end of a generation cycle, or the resumed run would generate other ones than the uninterrupted run has used.

The Trainer writes `trainer_state.json` after everything else it needs to resume, so a checkpoint that has it is whole
as far as the process is concerned. Files cut short in it (the machine went down) are found by their own formats: a zip
archive ends in its directory, a safetensors header says the length.
"""

import math
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.m3po.modules import ADDED_MODULES
from trl import GRPOConfig

from m3po_lab.core.errors import UserError
from m3po_lab.core.files import read_json

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
NEEDED = ("m3po.json", "trainer_state.json")
STATES = ("optimizer", "scheduler")  # files or folders whose names begin so, whatever the engine


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
    folders = [path for path in folder.glob("checkpoint-*") if path.is_dir() and CHECKPOINT.fullmatch(path.name)]
    return sorted(folders, key=step_of)


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


def resuming(folder: Path) -> list[str]:
    """The flags with which a run goes on in its folder, or starts anew where what is there is of no use."""
    existing = checkpoints(folder)
    if any(missing_part(path) is None for path in existing):
        return ["--resume_from_checkpoint", "true"]
    return ["--overwrite", "true"] if existing else []
