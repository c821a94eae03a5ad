# SPDX-License-Identifier: Apache-2.0
"""Runs one after the other, each in a process of its own; those that are done are not run again."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from m3po_lab.core.files import read_json


@dataclass(frozen=True)
class PlannedRun:
    """A run that is to be done.

    Args:
        label: names it on the terminal, e.g. `mode m3po, seed 0`.
        folder: of the run.
        words: of its command line.
    """

    label: str
    folder: Path
    words: Sequence[str]

    def is_done(self, result: str) -> bool:
        """Whether the folder has the file that a run writes at its end."""
        return read_json(self.folder / result) is not None


def run_all(module: str, runs: Sequence[PlannedRun], result: str) -> int:
    """Run what is not done; returns the exit code of the run that failed, or 0.

    Args:
        module: the command that does one run.
        runs: in their order.
        result: name of the file that a run writes at its end.
    """
    for number, run in enumerate(runs, start=1):
        label = f"run {number} of {len(runs)}: {run.label}"
        if run.is_done(result):
            print(f"{label}: done before", flush=True)
            continue
        print(label, flush=True)
        code = subprocess.run([sys.executable, "-m", module, *run.words], check=False).returncode
        if code:
            print(f"error: {label} ended with exit code {code}; the same command goes on from there.", file=sys.stderr)
            return code
    return 0
