# SPDX-License-Identifier: Apache-2.0
"""Pretrain one NanoChat, with hyper-connections or without: ``python -m m3po_lab.pretrain X.yaml [--flag value ...]``.

`pretrain_pair` starts the two runs of a comparison. Exit codes: 0 done, 2 a wrong input or a failing environment (one
line says which), 130 interrupted by Ctrl-C.
"""

import sys
from collections.abc import Sequence

from m3po_lab.command_line.entry import start

WAY_ON = "The same command goes on from the last whole checkpoint."


def main(argv: Sequence[str] | None = None) -> int:
    """Pretrain as command-line words say (those of the process by default); returns the exit code."""
    from m3po_lab.command_line.quiet import silence_known_noise

    silence_known_noise()
    from m3po_lab.core.errors import exit_code, failures_said
    from m3po_lab.pretraining.arguments import parse
    from m3po_lab.pretraining.run import run_pretraining

    words = list(sys.argv[1:] if argv is None else argv)

    def start() -> None:
        run = parse(words)
        with failures_said(run.folder, "--per_device_train_batch_size", lambda: WAY_ON):
            run_pretraining(run)

    return exit_code(start, f"Stopped. {WAY_ON}")


if __name__ == "__main__":
    start(main)
