# SPDX-License-Identifier: Apache-2.0
"""What the hyper-connections of a checkpoint do: ``bash scripts/report_mhc.sh CHECKPOINT [--flag value ...]``.

For each sublayer how far H_res is from doubly stochastic, from its start and from the identity, how alike the streams
are and how large the gradients; what the routing gate changes; and a line for whatever does nothing. Written to
`report.md` and `routing.png` too. Exit codes: 0 reported, 2 a wrong input or a failing environment, 130 interrupted by
Ctrl-C.
"""

import sys
from collections.abc import Sequence

from m3po_lab.command_line.entry import start
from m3po_lab.command_line.plain_parser import OneLineFlags
from m3po_lab.core.errors import exit_code
from m3po_lab.pretraining.routing_gates import HELP


def main(argv: Sequence[str] | None = None) -> int:
    """Report as command-line words say (those of the process by default); returns the exit code."""
    from m3po_lab.command_line.quiet import silence_known_noise

    silence_known_noise()
    from m3po_lab.pretraining.routing_report import run

    flags = OneLineFlags(usage="bash scripts/report_mhc.sh CHECKPOINT [--flag value ...]")
    flags.add_argument("checkpoint", help="a model folder, e.g. runs/mhc_small/mhc-seed0/final")
    flags.add_argument("--gate", help=f"the report has its effect against 1 too; {HELP}")
    flags.add_argument(
        "--dataset",
        default="python:sympy",
        help="'python:<package>' (the files of an installed package), 'reasoning-gym:<task>' (solved problems), a "
        ".jsonl with 'text', or a Hub id",
    )
    flags.add_argument("--output_dir", help="default: evals/<run>-final-routing-<digest of the model and the text>")
    words = list(sys.argv[1:] if argv is None else argv)
    return exit_code(lambda: run(flags.parse_args(words)), "Stopped.")


if __name__ == "__main__":
    start(main)
