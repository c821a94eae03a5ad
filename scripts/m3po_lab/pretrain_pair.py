# SPDX-License-Identifier: Apache-2.0
"""Hyper-connections against the plain model: ``bash scripts/train_mhc.sh [X.yaml] [--seeds S ...] [--flag value ...]``.

Each seed has two runs that differ in `mhc_enabled` alone, each in a process of its own, in
`<output_dir>/<variant>-seed<seed>`. The same command goes on after a stop. At the end `report.md` and two figures.
Exit codes: 0 all runs are done and compared, 2 a wrong input or a failing environment, 130 interrupted by Ctrl-C; else
that of the run that failed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from m3po_lab.command_line.commands import flag_name, shown_command
from m3po_lab.command_line.entry import start
from m3po_lab.command_line.plain_parser import OneLineFlags
from m3po_lab.core.config_files import OF_PRETRAINING, find_config, split_config
from m3po_lab.core.errors import PROJECT_ROOT, UserError, exit_code


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
        options, more = flags.parse_known_args(rest)
        config = find_config(yaml or "configs/mhc_small.yaml", begins=OF_PRETRAINING)
        if any(flag_name(word) in ("mhc_enabled", "seed") for word in more):
            raise UserError("--mhc_enabled and --seed are what the runs of a comparison differ in: give --seeds.")
        folder = options.output_dir or PROJECT_ROOT / "runs" / config.stem
        from m3po_lab.command_line.quiet import silence_known_noise

        silence_known_noise()
        from m3po_lab.experiments.pair import run_pairs

        return run_pairs(config, options.seeds, folder.resolve(), more)

    return exit_code(start, f"Stopped. Go on with: {shown_command('scripts/train_mhc.sh', words)}")


if __name__ == "__main__":
    start(main)
