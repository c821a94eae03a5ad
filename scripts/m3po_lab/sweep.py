# SPDX-License-Identifier: Apache-2.0
"""Train modes over seeds and compare them: ``bash scripts/sweep.sh [X.yaml] [--modes ... | --gates ...] [--flag X]``.

Every run is a process of its own with the same command but for mode and seed, in `<output_dir>/<mode>-seed<seed>`.
A mode is named as in the table: `m3po`, `m3po:raw_dot` (with that gate), `none+aslr` (with ASLR), `h3po:raw_dot+aslr`.
`--gates` is for mode `m3po` with each gate, and the control.
The same command goes on after a stop: finished runs are kept, a run that was stopped is resumed from its last
checkpoint. At the end `comparison.md` has the tables and each mode against the control.
Exit codes: 0 all runs are done and compared, 2 a wrong input or a failing environment, 130 interrupted by Ctrl-C; else
that of the run that failed.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from m3po_lab.config import Run

DEFAULT_CONFIG = "configs/demo_short.yaml"
DEFAULT_MODES = ("none", "m3po", "hrpo", "h3po")
OF_THE_RUNS = ("mode", "seed", "aslr_enabled", "overwrite", "resume_from_checkpoint")  # flags that a sweep gives them


def mode_words(mode: str) -> list[str]:
    """The flags of a mode as it is named here: with the gate behind a colon, and with ASLR if it ends in `+aslr`.

    Raises:
        UserError: it is not of that form, or the mode has no gate.
    """
    from transformers.m3po.settings import CROSS_PATH_MODES

    from m3po_lab.config import UserError

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

    from m3po_lab.compare import CONTROL
    from m3po_lab.config import UserError

    if gates is None:
        return list(modes or DEFAULT_MODES)
    if modes is not None:
        raise UserError("--gates and --modes exclude each other: give one, gates as --modes none m3po:raw_dot.")
    return [CONTROL, *(f"m3po:{gate}" for gate in gates or list_gating_functions())]


def check_modes(config: Path, modes: Sequence[str], more: Sequence[str]) -> None:
    """Read the command of every mode, so that a wrong flag stops the sweep here and not after the first mode.

    Raises:
        UserError: a command is wrong, a flag does nothing in any of the modes, or two modes are one and the same.
    """
    from m3po_lab.commands import flag_name
    from m3po_lab.compare import variant
    from m3po_lab.config import UserError
    from m3po_lab.idle_flags import given_flags, idle_flags

    taken = [word for word in more if flag_name(word) in OF_THE_RUNS]
    if taken:
        raise UserError(f"{taken[0]} is what the runs of a sweep differ in, or the sweep's to set: leave it out.")
    named: dict[str, str] = {}
    idle = given_flags(more)
    for mode in modes:
        run = parse_mode(config, mode, more)
        idle &= set(idle_flags(run.groups, idle))
        training = run.training
        same = named.setdefault(variant(training.mode, training.gating_type, bool(training.aslr_enabled)), mode)
        if same != mode:
            raise UserError(f"--modes {same} and {mode} are the same here: leave out one of them.")
    if idle:
        raise UserError(f"--{min(idle)} does nothing in any of the modes {', '.join(modes)}: leave it out.")


def parse_mode(config: Path, mode: str, more: Sequence[str]) -> Run:
    """The parsed command of a mode, with the flags that do something in others only."""
    from m3po_lab.config import parse_run

    return parse_run([str(config), *more, *mode_words(mode)], idle=True)


def run_words(config: Path, mode: str, seed: int, folder: Path, more: Sequence[str]) -> list[str]:
    """The command-line words of one run; it resumes where there is something to resume."""
    from m3po_lab.checkpoints import checkpoints, missing_part
    from m3po_lab.files import shown_path

    words = [shown_path(config), *more, *mode_words(mode), "--seed", str(seed), "--output_dir", shown_path(folder)]
    found = checkpoints(folder)
    if any(missing_part(path) is None for path in found):
        return [*words, "--resume_from_checkpoint", "true"]
    return [*words, "--overwrite", "true"] if found else words


def check_done(place: Path, words: Sequence[str]) -> None:
    """Refuse a folder with another run in it, finished or stopped.

    Raises:
        UserError: it names the first flag that differs, with both values.
    """
    from m3po_lab.checkpoints import checkpoints
    from m3po_lab.config import UserError, parse_run
    from m3po_lab.engine import choose_engine
    from m3po_lab.files import read_json, shown_path
    from m3po_lab.identity import RUN_FILE, difference, of_run, recorded_flags

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


def sweep(config: Path, modes: Sequence[str], seeds: Sequence[int], folder: Path, more: Sequence[str]) -> int:
    """Run what is not done and compare; returns an exit code."""
    from m3po_lab.compare import comparison
    from m3po_lab.files import check_writable, shown_path, write_text
    from m3po_lab.idle_flags import given_flags, idle_flags, without

    check_writable(folder)
    pairs = [(mode, seed) for seed in seeds for mode in modes]
    places = {pair: folder / f"{pair[0].replace(':', '-')}-seed{pair[1]}" for pair in pairs}
    for (mode, seed), place in places.items():
        check_done(place, run_words(config, mode, seed, place, more))
    for number, (mode, seed) in enumerate(pairs, start=1):
        place = places[mode, seed]
        told = f"run {number} of {len(pairs)}: mode {mode}, seed {seed}"
        if (place / "summary.json").is_file():
            print(f"{told}: done before", flush=True)
            continue
        print(told, flush=True)
        own = without(more, idle_flags(parse_mode(config, mode, more).groups, given_flags(more)))
        command = [sys.executable, "-m", "m3po_lab.train", *run_words(config, mode, seed, place, own)]
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
    from m3po_lab.commands import shown_command
    from m3po_lab.errors import PROJECT_ROOT, OneLineFlags, exit_code, find_config, split_config

    flags = OneLineFlags(
        usage="bash scripts/sweep.sh [config.yaml] [--modes MODE ... | --gates [GATE ...]] [--seeds SEED ...] "
        "[--output_dir DIR] [--flag value ...]",
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
    flags.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    flags.add_argument("--output_dir", type=Path, help="folder of the runs (default: runs/sweep-[gates-]<config>)")
    words = list(sys.argv[1:] if argv is None else argv)

    def start() -> int:
        # Taken out first: argparse would take the value of a flag that it does not know for the YAML.
        yaml, rest = split_config(words)
        given, more = flags.parse_known_args(rest)
        config = find_config(yaml or DEFAULT_CONFIG)
        modes = named_modes(given.modes, given.gates)
        check_modes(config, modes, more)
        what = "sweep" if given.gates is None else "sweep-gates"
        folder = given.output_dir or PROJECT_ROOT / "runs" / f"{what}-{config.stem}"
        return sweep(config, modes, given.seeds, folder.resolve(), more)

    return exit_code(start, f"Stopped. Go on with: {shown_command('scripts/sweep.sh', words)}")


if __name__ == "__main__":
    sys.exit(main())
