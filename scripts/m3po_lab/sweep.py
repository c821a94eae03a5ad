# SPDX-License-Identifier: Apache-2.0
"""Train modes over seeds and compare them: ``bash scripts/sweep.sh [X.yaml] [--modes ... | --gates ...] [--flag X]``.

Every run is a process of its own with the same command but for mode, axes and seed, in a folder of `--output_dir` that
is named after them.
A mode is named as in the table: `m3po`, `m3po:raw_dot` (with that gating function), `none+aslr` (with ASLR),
`h3po:raw_dot+aslr`. `--gates` is for mode `m3po` with each gating function, and the control. `--axis
cross_path_lambda=0,0.1,0.3` varies any other flag in the modes that have it; several axes multiply.
The same command goes on after a stop: finished runs are kept, a run that was stopped is resumed from its last
checkpoint. At the end `comparison.md` has the tables and each mode against the control.
Exit codes: 0 all runs are done and compared, 2 a wrong input or a failing environment, 130 interrupted by Ctrl-C; else
that of the run that failed.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from m3po_lab.command_line.commands import shown_command
from m3po_lab.command_line.entry import start
from m3po_lab.command_line.plain_parser import OneLineFlags
from m3po_lab.core.config_files import find_config, split_config
from m3po_lab.core.errors import PROJECT_ROOT, exit_code

DEFAULT_CONFIG = "configs/demo_short.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Sweep as command-line words say (those of the process by default); returns the exit code."""
    flags = OneLineFlags(
        usage="bash scripts/sweep.sh [config.yaml] [--modes MODE ... | --gates [GATE ...]] [--axis FLAG=VALUE,...] "
        "[--seeds SEED ...] [--output_dir DIR] [--flag value ...]",
        description=f"Train modes over seeds and compare them. The YAML of the runs is {DEFAULT_CONFIG} by default.",
        epilog="Other flags go to every run in which they do something, see bash scripts/train_grpo.sh --help.",
    )
    flags.add_argument(
        "--modes",
        nargs="+",
        help="the modes, the control among them; with a gating function as m3po:raw_dot, with ASLR as none+aslr or "
        "m3po:raw_dot+aslr (default: the four modes without)",
    )
    flags.add_argument(
        "--gates",
        nargs="*",
        metavar="GATE",
        help="in place of --modes: the control, and mode m3po with each of these gating functions, or with every one "
        "if none is named",
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
        "--output_dir", type=Path, help="the folder of the runs (default: runs/sweep-[gates-][axes-]<config>)"
    )
    words = list(sys.argv[1:] if argv is None else argv)

    def start() -> int:
        # Taken out first: argparse would take the value of a flag that it does not know for the YAML.
        yaml, rest = split_config(words)
        options, more = flags.parse_known_args(rest)
        config = find_config(yaml or DEFAULT_CONFIG)
        from m3po_lab.experiments.sweep import named_modes, read_axis, run_sweep, variants

        commands = variants(config, named_modes(options.modes, options.gates), options.axis, more)
        what = ["sweep", *([] if options.gates is None else ["gates"]), *(read_axis(text)[0] for text in options.axis)]
        folder = options.output_dir or PROJECT_ROOT / "runs" / "-".join([*what, config.stem])
        return run_sweep(config, commands, options.seeds, folder.resolve())

    return exit_code(start, f"Stopped. Go on with: {shown_command('scripts/sweep.sh', words)}")


if __name__ == "__main__":
    start(main)
