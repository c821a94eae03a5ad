# SPDX-License-Identifier: Apache-2.0
"""Pretrain one NanoChat, with hyper-connections or without: ``python -m m3po_lab.pretrain X.yaml [--flag value ...]``.

`pretrain_pair` starts the two runs of a comparison. Exit codes: 0 done, 2 a wrong input (one line says which), 130
interrupted by Ctrl-C.
"""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Pretrain as command-line words say (those of the process by default); returns the exit code."""
    from m3po_lab.quiet import silence_known_noise

    silence_known_noise()
    from m3po_lab.errors import exit_code
    from m3po_lab.pretrain_run import parse, run_pretraining

    words = list(sys.argv[1:] if argv is None else argv)
    return exit_code(
        lambda: run_pretraining(parse(words)), "Stopped. The same command goes on from the last checkpoint."
    )


if __name__ == "__main__":
    sys.exit(main())
