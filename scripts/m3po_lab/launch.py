# SPDX-License-Identifier: Apache-2.0
"""Entry point of a training in several processes: ``ACCELERATE_CONFIG=X.yaml bash scripts/train_grpo.sh ...``.

`accelerate launch` starts `m3po_lab.train` as often as the config file says. Added to it: a wrong file is one line, the
exit code is that of the process which ended first, and the message of that process is not buried under the launcher's
traceback.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Sequence

from m3po_lab.command_line.entry import start

SPOKEN = (2, 130)  # exit codes of `m3po_lab.train` after a line of its own


def main(argv: Sequence[str] | None = None) -> int:
    """Start the processes with command-line words (those of this process by default); returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    from accelerate.commands.launch import launch_command
    from torch.distributed import DistNetworkError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from m3po_lab.core.errors import UserError, failures_said, short
    from m3po_lab.core.processes import VARIABLE, launch_arguments, launch_config

    try:
        launched = launch_config()
        if launched is None:
            raise UserError(f"set {VARIABLE} to a config file of accelerate, e.g. configs/accelerate/cpu2.yaml.")
        file, config = launched
        if config.use_cpu:
            os.environ["ACCELERATE_USE_CPU"] = "true"  # torchrun does not learn of it, and would take a GPU
        logging.disable(logging.ERROR)  # this process would log ten lines for the one that is printed below
        with failures_said():
            launch_command(launch_arguments(file, words))
    except (UserError, ConnectionError, DistNetworkError, ValueError) as error:
        print(f"error: {short(error)}", file=sys.stderr)
        return 2
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return say_end(f"process {rank}", failure.exitcode)
    except subprocess.CalledProcessError as error:  # one process
        return say_end("the process", error.returncode)
    except (KeyboardInterrupt, SignalException):
        return 130
    return 0


def say_end(who: str, code: int) -> int:
    """Name the process that ended first and how, unless it has printed why itself; returns the exit code."""
    if code not in SPOKEN:
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        print(f"error: {who} {how}; the others were stopped.", file=sys.stderr)
    return code if code > 0 else 128 - code


if __name__ == "__main__":
    start(main)
