# SPDX-License-Identifier: Apache-2.0
"""The runs of a sweep: modes, gating functions and axes to commands, commands to folders, and their comparison."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.m3po.gating import list_gating_functions
from transformers.m3po.settings import CROSS_PATH_MODES

from m3po_lab.command_line.commands import flag_name
from m3po_lab.command_line.idle_flags import given_flags, idle_flags, without
from m3po_lab.core.errors import UserError
from m3po_lab.core.files import check_writable, read_json, shown_path, write_text
from m3po_lab.core.identity import RUN_FILE, WITHOUT_EFFECT, difference, flag_values, folder_of
from m3po_lab.experiments.comparison import CONTROL, SAME_FLAGS, comparison
from m3po_lab.experiments.runs import PlannedRun, run_all
from m3po_lab.grpo.arguments import Run
from m3po_lab.grpo.checkpoints import checkpoints, resuming
from m3po_lab.grpo.config import parse_run
from m3po_lab.grpo.engine import choose_engine
from m3po_lab.grpo.identity import of_run, recorded_flags, with_acting

DEFAULT_MODES = ("none", "m3po", "hrpo", "h3po")
OF_THE_RUNS = ("mode", "seed", "aslr_enabled", "overwrite", "resume_from_checkpoint")  # flags that a sweep gives them


def mode_words(mode: str) -> list[str]:
    """The flags of a mode as it is named here: a gating function stands behind a colon, `+aslr` at the end.

    Raises:
        UserError: it is not of that form, or the mode has no gating function.
    """
    whole, *extra = mode.split("+")
    name, colon, gating_type = whole.partition(":")
    if extra not in ([], ["aslr"]) or (colon and not gating_type):
        raise UserError(
            f"--modes {mode} is unknown: give a mode, or with gating function and ASLR m3po:raw_dot, m3po+aslr."
        )
    if gating_type and name not in CROSS_PATH_MODES:
        modes = " and ".join(CROSS_PATH_MODES)
        raise UserError(f"--modes {mode}: only {modes} have a gating function; leave out :{gating_type}.")
    gating = ["--gating_type", gating_type] if gating_type else []
    return ["--mode", name, *gating, "--aslr_enabled", "true" if extra else "false"]


def named_modes(modes: Sequence[str] | None, gates: Sequence[str] | None) -> list[str]:
    """What `--modes` and `--gates` ask for, the control first with the latter; an empty `gates` means all of them.

    Raises:
        UserError: both are given.
    """
    if gates is None:
        return list(modes or DEFAULT_MODES)
    if modes is not None:
        raise UserError(
            "--gates and --modes exclude each other: give one, gating functions as --modes none m3po:raw_dot."
        )
    return [CONTROL, *(f"m3po:{gate}" for gate in gates or list_gating_functions())]


def read_axis(text: str) -> tuple[str, list[str]]:
    """A flag and the values that a sweep gives it, from `flag=value,value`; commas within brackets separate nothing.

    Raises:
        UserError: it is not of that form, or a flag that the runs of a sweep cannot differ in.
    """
    name, equals, choices = text.removeprefix("--").partition("=")
    name, values = name.replace("-", "_"), re.split(r",(?![^\[{]*[\]}])", choices)
    if not equals or not all(values) or len(set(values)) < len(values):
        raise UserError(f"--axis {text}: give a flag and its different values, e.g. cross_path_lambda=0,0.1,0.3.")
    if name in OF_THE_RUNS:
        raise UserError(f"--axis {text}: a sweep sets --{name} itself; see --modes and --seeds.")
    if name in SAME_FLAGS:
        raise UserError(
            f"--axis {text}: runs are compared on the same problems, model and number of steps; make a sweep for each."
        )
    why = next((reason for reason, names in WITHOUT_EFFECT.items() if name in names), None)
    if why is not None:
        raise UserError(f"--axis {text}: --{name} changes no number of a run ({why}).")
    return name, values


def variants(config: Path, modes: Sequence[str], axes: Sequence[str], words: Sequence[str]) -> dict[str, list[str]]:
    """The flags of every variant by its name: each mode, with each combination of the axes that it has, and `words`.

    The command of each is read, so that a wrong flag stops the sweep here and not after the first run.

    Args:
        config: the YAML file of all runs.
        modes: as the sweep names them, see `mode_words`.
        axes: see `read_axis`.
        words: further flags, for every variant in which they do something.

    Raises:
        UserError: a command is wrong, no mode has the flag of an axis, a flag does nothing in any of the variants, or
            two of them are one and the same.
    """
    values_of = dict(read_axis(text) for text in axes)
    clashing = [word for word in words if flag_name(word) in (*OF_THE_RUNS, *values_of)]
    if clashing:
        raise UserError(f"{clashing[0]} is what the runs of a sweep differ in, or the sweep's to set: leave it out.")
    flags_of_variants = {mode: mode_words(mode) for mode in modes}
    for name, values in values_of.items():
        grown: dict[str, list[str]] = {}
        for variant, flags in flags_of_variants.items():
            if name in flags_of(parse_idle([str(config), *words, *flags])):
                grown |= {f"{variant} {name}={value}": [*flags, f"--{name}={value}"] for value in values}
            else:
                grown[variant] = flags
        if grown == flags_of_variants:
            parse_run([str(config), *words, f"--{name}={values[0]}"])  # refused here if there is no such flag
            raise UserError(f"--axis {name}: none of the modes {', '.join(modes)} has that flag; leave it out.")
        flags_of_variants = grown
    known: dict[str, str] = {}
    commands, idle = {}, given_flags(words)
    for variant, flags in flags_of_variants.items():
        run = parse_idle([str(config), *words, *flags])
        same = known.setdefault(json.dumps(flags_of(run), sort_keys=True), variant)
        if same != variant:
            raise UserError(f"--modes {same} and {variant} are the same here: leave out one of them.")
        idle_here = idle_flags(run.groups, given_flags(words))
        idle &= set(idle_here)
        commands[variant] = [*without(words, idle_here), *flags]
    if idle:
        raise UserError(f"--{min(idle)} does nothing in any of the modes {', '.join(commands)}: leave it out.")
    return commands


def parse_idle(words: list[str]) -> Run:
    """The parsed command of a variant, with the flags that do something in others only."""
    return parse_run(words, idle=True)


def flags_of(run: Run) -> dict[str, Any]:
    """The flags of a run, as far as it has them."""
    return with_acting(flag_values(run.script, run.training, run.model), run.training)


def run_words(config: Path, flags: Sequence[str], seed: int, folder: Path) -> list[str]:
    """The command-line words of one run of a variant with these flags; it resumes where there is something."""
    return [shown_path(config), *flags, "--seed", str(seed), "--output_dir", shown_path(folder), *resuming(folder)]


def check_done(place: Path, words: Sequence[str]) -> None:
    """Refuse a folder with another run in it, finished or stopped.

    Raises:
        UserError: it names the first flag that differs, with both values.
    """
    summary, recorded = read_json(place / "summary.json"), read_json(place / RUN_FILE)
    if summary is None and not checkpoints(place):
        return
    stored = recorded["flags"] if recorded else recorded_flags(summary) if summary else {}
    differing = difference(stored, of_run(parse_run(list(words), choose_engine(list(words)))))
    if differing is not None:
        name, stored_value, value = differing
        raise UserError(
            f"--{name} {value}: {shown_path(place)} has a run with {stored_value}; set that, or give another "
            "--output_dir."
        )
    if recorded is None and summary is not None:
        print(f"{shown_path(place)} has no {RUN_FILE}: compared by its summary.json, without the content of files")


def run_sweep(config: Path, commands: Mapping[str, Sequence[str]], seeds: Sequence[int], folder: Path) -> int:
    """Run what is not done of the variants and compare; returns an exit code.

    Args:
        config: the YAML file of all runs.
        commands: the flags of each variant, by its name.
        seeds: each variant has a run for each.
        folder: of the runs and the comparison.

    Raises:
        UserError: a folder has another run; nothing is trained then.
    """
    check_writable(folder)
    runs = []
    for seed in seeds:
        for variant, flags in commands.items():
            place = folder / folder_of(variant, seed)
            words = run_words(config, flags, seed, place)
            check_done(place, words)
            runs.append(PlannedRun(f"mode {variant}, seed {seed}", place, words))
    code = run_all("m3po_lab.train", runs, "summary.json")
    if code:
        return code
    text = comparison([str(run.folder) for run in runs])
    write_text(folder / "comparison.md", text + "\n")
    print(f"\n{text}\n\nwritten to {shown_path(folder / 'comparison.md')}")
    return 0
