# SPDX-License-Identifier: Apache-2.0
"""Hyper-connections against the plain model: ``bash scripts/train_mhc.sh [X.yaml] [--seeds S ...] [--flag value ...]``.

Each seed has two runs that differ in `mhc_enabled` alone, each in a process of its own, in
`<output_dir>/<variant>-seed<seed>`. The same command goes on after a stop. At the end `report.md` and two figures.
Exit codes: 0 all runs are done and compared, 2 a wrong input or a failing environment, 130 interrupted by Ctrl-C; else
that of the run that failed.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from m3po_lab.command_line.commands import flag_name, shown_command
from m3po_lab.command_line.entry import start
from m3po_lab.command_line.plain_parser import OneLineFlags
from m3po_lab.core.config_files import OF_PRETRAINING, find_config, split_config
from m3po_lab.core.errors import PROJECT_ROOT, UserError, exit_code

VARIANTS = {"baseline": "false", "mhc": "true"}


def run_pairs(config: Path, seeds: Sequence[int], folder: Path, more: Sequence[str]) -> int:
    """Run what is not done and report; returns an exit code."""
    from m3po_lab.command_line.quiet import silence_known_noise

    silence_known_noise()
    from m3po_lab.command_line.idle_flags import MHC, without
    from m3po_lab.core.files import check_writable, read_json, shown_path
    from m3po_lab.pretraining.report import write_report
    from m3po_lab.pretraining.run import check_folder, parse

    check_writable(folder)
    plan = [(seed, variant) for seed in seeds for variant in VARIANTS]
    places = {pair: folder / f"{pair[1]}-seed{pair[0]}" for pair in plan}
    commands = {}
    for (seed, variant), place in places.items():
        own = more if variant == "mhc" else without(more, MHC.split())
        words = [shown_path(config), *own, "--mhc_enabled", VARIANTS[variant], "--seed", str(seed)]
        commands[seed, variant] = [*words, "--output_dir", shown_path(place)]
        check_folder(parse(commands[seed, variant]))  # a wrong flag stops here, before anything is trained
    for number, ((seed, variant), words) in enumerate(commands.items(), start=1):
        place = places[seed, variant]
        print(f"run {number} of {len(plan)}: {variant}, seed {seed}", flush=True)
        if read_json(place / "result.json") is not None:
            print(f"{shown_path(place)}: done before", flush=True)
            continue
        code = subprocess.run([sys.executable, "-m", "m3po_lab.pretrain", *words], check=False).returncode
        if code:
            told = f"{variant}, seed {seed} ended with exit code {code}; the same command goes on from there."
            print(f"error: {told}", file=sys.stderr)
            return code
    print(f"\n{write_report(list(places.values()), folder)}\n")
    print(f"report  {shown_path(folder)}/report.md  curves.png  routing.png")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Compare as command-line words say (those of the process by default); returns the exit code."""
    flags = OneLineFlags(
        usage="bash scripts/train_mhc.sh [config.yaml] [--seeds SEED ...] [--output_dir DIR] [--flag value ...]",
        description="Pretrain NanoChat with and without hyper-connections and compare. The YAML is "
        "configs/mhc_small.yaml by default.",
        epilog="Other flags go to every run: bash scripts/run.sh python -m m3po_lab.pretrain --help.",
    )
    flags.add_argument("--seeds", nargs="+", type=int, default=[0])
    flags.add_argument("--output_dir", type=Path, help="folder of the runs (default: runs/<config>)")
    words = list(sys.argv[1:] if argv is None else argv)

    def start() -> int:
        yaml, rest = split_config(words)
        given, more = flags.parse_known_args(rest)
        config = find_config(yaml or "configs/mhc_small.yaml", begins=OF_PRETRAINING)
        if any(flag_name(word) in ("mhc_enabled", "seed") for word in more):
            raise UserError("--mhc_enabled and --seed are what the runs of a comparison differ in: give --seeds.")
        folder = given.output_dir or PROJECT_ROOT / "runs" / config.stem
        return run_pairs(config, given.seeds, folder.resolve(), more)

    return exit_code(start, f"Stopped. Go on with: {shown_command('scripts/train_mhc.sh', words)}")


if __name__ == "__main__":
    start(main)
