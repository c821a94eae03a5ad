# SPDX-License-Identifier: Apache-2.0
"""A controller of the routing gate: ``bash scripts/train_controller.sh CHECKPOINT [controller_X.yaml] [--flag ...]``.

PPO sets the gates of a frozen model with hyper-connections by problem, and is compared with what does not look at the
problem and with simpler ways to look. First it is measured whether the gate does anything; where it does not, nothing
is trained. The same command goes on after a stop. At the end `report.md` with its figures.
Exit codes: 0 done, 2 a wrong input (a gate without effect among them) or a failing environment, 130 interrupted.
"""

import sys
from collections.abc import Sequence

from m3po_lab.command_line.entry import start
from m3po_lab.core.errors import exit_code

WAY_ON = "The same command goes on from there."


def main(argv: Sequence[str] | None = None) -> int:
    """Train as command-line words say (those of the process by default); returns the exit code."""
    from m3po_lab.command_line.quiet import silence_known_noise

    silence_known_noise()
    from m3po_lab.controller.arguments import parse
    from m3po_lab.controller.experiment import run_controller
    from m3po_lab.core.errors import failures_said

    words = list(sys.argv[1:] if argv is None else argv)

    def start() -> None:
        run = parse(words)
        with failures_said(run.folder, "--num_envs", lambda: WAY_ON):
            run_controller(run)

    return exit_code(start, f"Stopped. {WAY_ON}")


if __name__ == "__main__":
    start(main)
