# SPDX-License-Identifier: Apache-2.0
"""Evaluate a base model by lm-eval: ``bash scripts/eval_mhc.sh CHECKPOINT [--gate G] [--baseline CHECKPOINT] ...``.

GSM8K with 0 and 8 examples, HellaSwag, ARC-Easy and bits per byte are lm-eval's own tasks; from the Hub, or with
`--data DIR` from files of the same formats. With `--baseline` each task is run on that model too, and the seconds and
the memory of decoding stand side by side. With `--controller FOLDER`, of scripts/train_controller.sh, so do the gates
that its policy sets by prompt, and constant ones. A command that was stopped goes on behind the tasks that are done.
Exit codes: 0 evaluated, 2 a wrong input or a failing environment, 130 interrupted by Ctrl-C.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from m3po_lab.command_line.entry import start
from m3po_lab.command_line.plain_parser import OneLineFlags
from m3po_lab.core.errors import exit_code
from m3po_lab.pretraining.routing_gates import HELP


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as command-line words say (those of the process by default); returns the exit code."""
    from m3po_lab.command_line.quiet import silence_known_noise

    silence_known_noise()
    from m3po_lab.controller.policy import load_controller
    from m3po_lab.pretraining.evaluation import run
    from m3po_lab.pretraining.tasks import FILES

    flags = OneLineFlags(usage="bash scripts/eval_mhc.sh CHECKPOINT [--flag value ...]")
    flags.add_argument("checkpoint", help="a model folder, e.g. runs/mhc_small/mhc-seed0/final")
    flags.add_argument("--baseline", help="another one, evaluated beside it")
    flags.add_argument("--gate", help=HELP)
    flags.add_argument("--controller", help="a policy's folder, e.g. runs/controller_arithmetic/layer-seed0")
    flags.add_argument("--tasks", nargs="+", choices=list(FILES), default=list(FILES), metavar="TASK")
    flags.add_argument("--data", help="folder with the tasks' files, see docs/hyper-connections.md (default: the Hub)")
    flags.add_argument("--limit", type=int, help="the first N problems of each task")
    flags.add_argument("--output_dir", help="default: evals/<run>-final-<digest of the model and the options>")
    words = list(sys.argv[1:] if argv is None else argv)

    def evaluate() -> None:
        options = flags.parse_args(words)
        run(options, load_controller(Path(options.controller)) if options.controller else None)

    return exit_code(evaluate, "Stopped. The same command goes on behind the tasks that are done.")


if __name__ == "__main__":
    start(main)
