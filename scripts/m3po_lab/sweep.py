# SPDX-License-Identifier: Apache-2.0
"""Train modes over seeds and compare them: ``bash scripts/sweep.sh [X.yaml] [--modes ... | --gates ...] [--flag X]``.

Every run is a process of its own with the same command but for mode, axes and seed, in a folder of `--output_dir` that
is named after them.
A mode is named as in the table: `m3po`, `m3po:raw_dot` (with that gate), `none+aslr` (with ASLR), `h3po:raw_dot+aslr`.
`--gates` is for mode `m3po` with each gate, and the control. `--axis cross_path_lambda=0,0.1,0.3` varies any other flag
in the modes that have it; several axes multiply.
The same command goes on after a stop: finished runs are kept, a run that was stopped is resumed from its last
checkpoint. At the end `comparison.md` has the tables and each mode against the control.
Exit codes: 0 all runs are done and compared, 2 a wrong input or a failing environment, 130 interrupted by Ctrl-C; else
that of the run that failed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3po_lab.command_line.commands import flag_name, shown_command

if TYPE_CHECKING:
    from m3po_lab.grpo.arguments import Run

from m3po_lab.command_line.entry import start

DEFAULT_CONFIG = "configs/demo_short.yaml"
DEFAULT_MODES = ("none", "m3po", "hrpo", "h3po")
OF_THE_RUNS = ("mode", "seed", "aslr_enabled", "overwrite", "resume_from_checkpoint")  # flags that a sweep gives them


def mode_words(mode: str) -> list[str]:
    """The flags of a mode as it is named here: with the gate behind a colon, and with ASLR if it ends in `+aslr`.

    Raises:
        UserError: it is not of that form, or the mode has no gate.
    """
    from transformers.m3po.settings import CROSS_PATH_MODES

    from m3po_lab.core.errors import UserError

    whole, *extra = mode.split("+")
    name, colon, gate = whole.partition(":")
    if extra not in ([], ["aslr"]) or (colon and not gate):
        raise UserError(f"--modes {mode} is unknown: give a mode, or with gate and ASLR m3po:raw_dot, m3po+aslr.")
    if gate and name not in CROSS_PATH_MODES:
        raise UserError(f"--modes {mode}: only {' and '.join(CROSS_PATH_MODES)} have a gate; leave out :{gate}.")
    return ["--mode", name, *(["--gating_type", gate] if gate else []), "--aslr_enabled", "true" if extra else "false"]


def named_modes(modes: Sequence[str] | None, gates: Sequence[str] | None) -> list[str]:
    """What `--modes` and `--gates` ask for, the control first with the latter; an empty `gates` means all of them.

    Raises:
        UserError: both are given.
    """
    from transformers.m3po.gating import list_gating_functions

    from m3po_lab.core.errors import UserError
    from m3po_lab.experiments.comparison import CONTROL

    if gates is None:
        return list(modes or DEFAULT_MODES)
    if modes is not None:
        raise UserError("--gates and --modes exclude each other: give one, gates as --modes none m3po:raw_dot.")
    return [CONTROL, *(f"m3po:{gate}" for gate in gates or list_gating_functions())]


def read_axis(text: str) -> tuple[str, list[str]]:
    """A flag and the values that a sweep gives it, from `flag=value,value`; commas within brackets separate nothing.

    Raises:
        UserError: it is not of that form, or a flag that the runs of a sweep cannot differ in.
    """
    from m3po_lab.core.errors import UserError
    from m3po_lab.core.identity import WITHOUT_EFFECT
    from m3po_lab.experiments.comparison import SAME_FLAGS

    name, equals, given = text.removeprefix("--").partition("=")
    name, values = name.replace("-", "_"), re.split(r",(?![^\[{]*[\]}])", given)
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


def variants(config: Path, modes: Sequence[str], axes: Sequence[str], more: Sequence[str]) -> dict[str, list[str]]:
    """The flags of every variant by its name: each mode, with each combination of the axes that it has, and `more`.

    The command of each is read, so that a wrong flag stops the sweep here and not after the first run.

    Raises:
        UserError: a command is wrong, no mode has the flag of an axis, a flag does nothing in any of the variants, or
            two of them are one and the same.
    """
    from m3po_lab.command_line.idle_flags import given_flags, idle_flags, without
    from m3po_lab.core.errors import UserError
    from m3po_lab.grpo.config import parse_run

    read = dict(read_axis(text) for text in axes)
    taken = [word for word in more if flag_name(word) in (*OF_THE_RUNS, *read)]
    if taken:
        raise UserError(f"{taken[0]} is what the runs of a sweep differ in, or the sweep's to set: leave it out.")
    found = {mode: mode_words(mode) for mode in modes}
    for name, values in read.items():
        grown: dict[str, list[str]] = {}
        for told, words in found.items():
            if name in flags_of(parse_idle([str(config), *more, *words])):
                grown |= {f"{told} {name}={value}": [*words, f"--{name}={value}"] for value in values}
            else:
                grown[told] = words
        if grown == found:
            parse_run([str(config), *more, f"--{name}={values[0]}"])  # says so if there is no such flag
            raise UserError(f"--axis {name}: none of the modes {', '.join(modes)} has that flag; leave it out.")
        found = grown
    known: dict[str, str] = {}
    commands, idle = {}, given_flags(more)
    for told, words in found.items():
        run = parse_idle([str(config), *more, *words])
        same = known.setdefault(json.dumps(flags_of(run), sort_keys=True), told)
        if same != told:
            raise UserError(f"--modes {same} and {told} are the same here: leave out one of them.")
        of_others = idle_flags(run.groups, given_flags(more))
        idle &= set(of_others)
        commands[told] = [*without(more, of_others), *words]
    if idle:
        raise UserError(f"--{min(idle)} does nothing in any of the modes {', '.join(found)}: leave it out.")
    return commands


def parse_idle(words: list[str]) -> Run:
    """The parsed command of a variant, with the flags that do something in others only."""
    from m3po_lab.grpo.config import parse_run

    return parse_run(words, idle=True)


def flags_of(run: Run) -> dict[str, Any]:
    """The flags of a run, as far as it has them."""
    from m3po_lab.core.identity import flag_values
    from m3po_lab.grpo.identity import with_acting

    return with_acting(flag_values(run.script, run.training, run.model), run.training)


def folder_of(told: str, seed: int) -> str:
    """The name of a run's folder, from that of its variant; other characters than a path likes are replaced."""
    from m3po_lab.core.identity import short_digest

    plain = told.replace(":", "-").replace(" ", "-").replace("=", "-")
    safe = re.sub(r"[^\w.+-]", "_", plain, flags=re.ASCII)
    return f"{safe}{'' if safe == plain else f'-{short_digest(told)[:8]}'}-seed{seed}"


def run_words(config: Path, own: Sequence[str], seed: int, folder: Path) -> list[str]:
    """The command-line words of one run of a variant with the flags `own`; it resumes where there is something."""
    from m3po_lab.core.files import shown_path
    from m3po_lab.grpo.checkpoints import checkpoints, missing_part

    words = [shown_path(config), *own, "--seed", str(seed), "--output_dir", shown_path(folder)]
    found = checkpoints(folder)
    if any(missing_part(path) is None for path in found):
        return [*words, "--resume_from_checkpoint", "true"]
    return [*words, "--overwrite", "true"] if found else words


def check_done(place: Path, words: Sequence[str]) -> None:
    """Refuse a folder with another run in it, finished or stopped.

    Raises:
        UserError: it names the first flag that differs, with both values.
    """
    from m3po_lab.core.errors import UserError
    from m3po_lab.core.files import read_json, shown_path
    from m3po_lab.core.identity import RUN_FILE, difference
    from m3po_lab.grpo.checkpoints import checkpoints
    from m3po_lab.grpo.config import parse_run
    from m3po_lab.grpo.engine import choose_engine
    from m3po_lab.grpo.identity import of_run, recorded_flags

    summary, told = read_json(place / "summary.json"), read_json(place / RUN_FILE)
    if summary is None and not checkpoints(place):
        return
    stored = told["flags"] if told else recorded_flags(summary) if summary else {}
    differing = difference(stored, of_run(parse_run(list(words), choose_engine(list(words)))))
    if differing is not None:
        name, before, now = differing
        raise UserError(
            f"--{name} {now}: {shown_path(place)} has a run with {before}; set that, or give another --output_dir."
        )
    if told is None and summary is not None:
        print(f"{shown_path(place)} has no {RUN_FILE}: compared by its summary.json, without the content of files")


def sweep(config: Path, found: Mapping[str, Sequence[str]], seeds: Sequence[int], folder: Path) -> int:
    """Run what is not done of the variants, given by name with their flags, and compare; returns an exit code."""
    from m3po_lab.core.files import check_writable, shown_path, write_text
    from m3po_lab.experiments.comparison import comparison

    check_writable(folder)
    pairs = [(told, seed) for seed in seeds for told in found]
    places = {pair: folder / folder_of(*pair) for pair in pairs}
    for (told, seed), place in places.items():
        check_done(place, run_words(config, found[told], seed, place))
    for number, ((variant, seed), place) in enumerate(places.items(), start=1):
        told = f"run {number} of {len(pairs)}: mode {variant}, seed {seed}"
        if (place / "summary.json").is_file():
            print(f"{told}: done before", flush=True)
            continue
        print(told, flush=True)
        command = [sys.executable, "-m", "m3po_lab.train", *run_words(config, found[variant], seed, place)]
        code = subprocess.run(command, check=False).returncode
        if code:
            print(f"error: {told} ended with exit code {code}; the same command goes on from there.", file=sys.stderr)
            return code
    text = comparison([str(place) for place in places.values()])
    write_text(folder / "comparison.md", text + "\n")
    print(f"\n{text}\n\nwritten to {shown_path(folder / 'comparison.md')}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Sweep as command-line words say (those of the process by default); returns the exit code."""
    from m3po_lab.command_line.plain_parser import OneLineFlags
    from m3po_lab.core.config_files import find_config, split_config
    from m3po_lab.core.errors import PROJECT_ROOT, exit_code

    flags = OneLineFlags(
        usage="bash scripts/sweep.sh [config.yaml] [--modes MODE ... | --gates [GATE ...]] [--axis FLAG=VALUE,...] "
        "[--seeds SEED ...] [--output_dir DIR] [--flag value ...]",
        description=f"Train modes over seeds and compare them. The YAML of the runs is {DEFAULT_CONFIG} by default.",
        epilog="Other flags go to every run in which they do something, see bash scripts/train_grpo.sh --help.",
    )
    flags.add_argument(
        "--modes",
        nargs="+",
        help="modes, the control among them; with a gate as m3po:raw_dot, with ASLR as none+aslr, m3po:raw_dot+aslr "
        "... (default: the four without)",
    )
    flags.add_argument(
        "--gates",
        nargs="*",
        metavar="GATE",
        help="in place of --modes: the control, and mode m3po with each of these gates (none named: with every gate)",
    )
    flags.add_argument(
        "--axis",
        action="append",
        default=[],
        metavar="FLAG=VALUE,...",
        help="vary a flag in the modes that have it, e.g. cross_path_lambda=0,0.1,0.3; may be given several times, for "
        "every combination",
    )
    flags.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    flags.add_argument(
        "--output_dir", type=Path, help="folder of the runs (default: runs/sweep-[gates-][axes-]<config>)"
    )
    words = list(sys.argv[1:] if argv is None else argv)

    def start() -> int:
        # Taken out first: argparse would take the value of a flag that it does not know for the YAML.
        yaml, rest = split_config(words)
        given, more = flags.parse_known_args(rest)
        config = find_config(yaml or DEFAULT_CONFIG)
        found = variants(config, named_modes(given.modes, given.gates), given.axis, more)
        what = ["sweep", *([] if given.gates is None else ["gates"]), *(read_axis(text)[0] for text in given.axis)]
        folder = given.output_dir or PROJECT_ROOT / "runs" / "-".join([*what, config.stem])
        return sweep(config, found, given.seeds, folder.resolve())

    return exit_code(start, f"Stopped. Go on with: {shown_command('scripts/sweep.sh', words)}")


if __name__ == "__main__":
    start(main)
