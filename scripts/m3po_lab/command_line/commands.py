# SPDX-License-Identifier: Apache-2.0
"""Commands as they are shown to a user: pasted into the same terminal, they run. Nothing large is imported here."""

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from m3po_lab.core.errors import PROJECT_ROOT
from m3po_lab.core.files import shown_path

CONTINUE = {"resume_from_checkpoint": "true", "overwrite": None}


def shown_command(script: str, words: Sequence[str], changes: Mapping[str, str | None] | None = None) -> str:
    """The shell command that starts a script of this project from the current folder.

    Args:
        script: its path in the project, e.g. `scripts/train_grpo.sh`; one of `.sh` is started by bash.
        words: of its command line.
        changes: flags that get another value than in `words`; None leaves the flag out.
    """
    changes = changes or {}
    remaining = without_flags(words, changes)
    remaining += [word for name, value in changes.items() if value is not None for word in (f"--{name}", value)]
    start = ["bash"] if script.endswith(".sh") else []
    return shlex.join([*start, shown_path(PROJECT_ROOT / script), *remaining])


def train_command(words: Sequence[str], changes: Mapping[str, str | None] | None = None) -> str:
    """The shell command that starts a training, in as many processes as this one; see `shown_command`."""
    from m3po_lab.core.processes import VARIABLE

    processes = os.environ.get(VARIABLE)
    prefix = f"{VARIABLE}={shlex.quote(processes)} " if processes else ""
    return prefix + shown_command("scripts/train_grpo.sh", words, changes)


def without_flags(words: Sequence[str], names: Iterable[str]) -> list[str]:
    """Command-line words without these flags and their values, however they are written."""
    names, remaining, at = set(names), [], 0
    while at < len(words):
        word = words[at]
        at += 1
        if flag_name(word) not in names:
            remaining.append(word)
        elif "=" not in word and at < len(words) and not words[at].startswith("--"):
            at += 1
    return remaining


def flag_name(word: str) -> str | None:
    """The name of the flag that a word of a command line begins: `a_b` of `--a_b`, `--a-b` and `--a_b=1`; else None."""
    return word[2:].partition("=")[0].replace("-", "_") if word.startswith("--") else None


def shown_file(path: Path) -> str:
    """A path as it can be pasted into a command: relative where that is shorter, quoted where it has to be."""
    return shlex.quote(shown_path(path))
