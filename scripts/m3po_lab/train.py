# SPDX-License-Identifier: Apache-2.0
"""Entry point of a training run: ``bash scripts/train_grpo.sh [X.yaml] [--flag value ...]``.

Exit codes: 0 the run ended with its report, 2 a wrong input or a failing environment (one line says which), 130
interrupted by Ctrl-C.
Of several processes, which `m3po_lab.launch` starts, the first one speaks. The libraries are imported inside `main`,
after the environment variables that they read at import are set, and Unsloth, if it trains, before all others.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from m3po_lab.command_line.entry import start

if TYPE_CHECKING:
    from m3po_lab.grpo.arguments import Run

# What to lower where memory is short: the same run, but for the order in which sums are made.
BATCH_FLAGS = (
    "--per_device_train_batch_size, and raise --gradient_accumulation_steps by as much (in an evaluation, lower "
    "--per_device_eval_batch_size)"
)
PATIENCE = 10  # seconds that another process waits for the first one to say what is wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Run a training from command-line words (those of the process by default); returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # a run sends nothing anywhere
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # no warning at a fork
    if os.environ.get("RANK", "0") != "0":
        os.environ["TQDM_DISABLE"] = "1"  # one process shows the progress bars
    from m3po_lab.core.errors import UserError, failures_said

    try:
        with failures_said():
            return train(words)
    except UserError as error:
        return refused(error)


def train(words: list[str]) -> int:
    """Run a training; returns the exit code.

    Raises:
        UserError: for a wrong input or an environment that fails.
    """
    from m3po_lab.grpo.engine import choose_engine, enter

    engine = choose_engine(words)
    enter(engine)
    from m3po_lab.command_line.quiet import silence_known_noise

    silence_known_noise()
    from m3po_lab.core.errors import failures_said
    from m3po_lab.core.processes import check_joined, check_started
    from m3po_lab.grpo.config import parse_run
    from m3po_lab.grpo.session import run_session

    run: Run | None = None
    try:
        check_started()
        run = parse_run(words, engine)
        check_joined(run.training)
        with failures_said(run.folder, BATCH_FLAGS, lambda: way_on(words, run)):
            run_session(run, words)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher passes on the one that the terminal sent already
        if os.environ.get("RANK", "0") == "0":
            print(f"\nStopped. {way_on(words, run)}", file=sys.stderr)
        return 130
    return 0


def way_on(words: Sequence[str], run: Run | None) -> str:
    """How a run that was stopped goes on: from its newest whole checkpoint, else as it was started."""
    from m3po_lab.command_line.commands import CONTINUE, train_command
    from m3po_lab.grpo.checkpoints import checkpoints, missing_part

    folders = checkpoints(run.folder) if run else []
    whole = [path for path in folders if missing_part(path) is None]
    if whole:
        return f"Continue from {whole[-1].name} with: {train_command(words, CONTINUE)}"
    half_written = bool(folders) and run is not None and run.training.resume_from_checkpoint is None
    again = train_command(words, {"overwrite": "true"} if half_written else {})
    return f"No checkpoint yet. Start again with: {again}"


def refused(error: Exception) -> int:
    """Says what is wrong with the input; returns the exit code."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(PATIENCE)  # as a rule the first one says the same, and the launcher then ends this one
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    start(main)
