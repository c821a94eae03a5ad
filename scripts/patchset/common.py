# SPDX-License-Identifier: Apache-2.0
"""What every command shares: the two ways to stop, progress lines, path rules, the lock, the test-only fault hook."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

# The boundaries at which a test may have the tool kill itself (PATCHSET_KILL_AT=<step>), in the order apply meets them.
STEPS = (
    "locked", "recovered", "planned", "backed-up", "git-made", "pristine-built", "series-built", "git-staged",
    "tree-staged", "links-staged", "state-staged", "old-moved-away", "new-moved-in", "old-set-aside", "old-removed",
    "refs-moved", "links-synced", "state-written",
)  # fmt: skip


class Stop(Exception):
    """Ends a command with a message; `code` is the exit status."""

    code = 2


class Refused(Stop):
    """The input or the state of the checkout forbids the command: nothing was changed (exit 2)."""


class Drift(Stop):
    """The tree and patches/ disagree, or a patch does not apply (exit 1)."""

    code = 1


def progress(text: str) -> None:
    """One line on stderr, so that stdout holds results only."""
    print(text, file=sys.stderr, flush=True)


def reached(step: str) -> None:
    """Mark a step boundary; tests kill the process here to prove that the next call recovers."""
    if step not in STEPS:
        raise ValueError(f"unknown step {step}")
    if os.environ.get("PATCHSET_KILL_AT") == step:
        os.kill(os.getpid(), signal.SIGKILL)


def path_fault(path: str) -> str | None:
    """Why `path` must not be written inside a checkout, or None when it is a plain relative path below its root."""
    if not path or path.startswith("/") or re.match(r"[A-Za-z]:", path):
        return "absolute or empty path"
    if "\\" in path or any(ord(c) < 32 or ord(c) == 127 for c in path):
        return "backslash or control character in the path"
    for part in path.split("/"):
        if part in ("", ".", ".."):
            return "path with an empty, '.' or '..' part"
        if part.lower().rstrip(". ") in (".git", "git~1"):
            return "path into .git"
    return None


def is_read_only(error: OSError) -> bool:
    """Whether a write failed because this user, or anyone, may not write there."""
    return error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)


def open_lock(file: Path) -> tuple[int, int]:
    """The lock file, made if need be, and the lock to take on it: a shared one for who may not write it."""
    try:
        file.parent.mkdir(exist_ok=True)
        return os.open(file, os.O_RDWR | os.O_CREAT, 0o644), fcntl.LOCK_EX
    except OSError as error:
        if not is_read_only(error):
            raise
    with contextlib.suppress(FileNotFoundError):
        return os.open(file, os.O_RDONLY), fcntl.LOCK_SH
    return os.open(os.devnull, os.O_RDONLY), fcntl.LOCK_SH  # nobody has written here since the checkout was made


@contextlib.contextmanager
def lock(root: Path, wait: float = 5.0) -> Iterator[None]:
    """Hold the checkout's lock. Children inherit it: a git that outlives a kill keeps the next call waiting."""
    fd, kind = open_lock(root / ".cache" / "patchset.lock")
    try:
        os.set_inheritable(fd, True)
        end = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(fd, kind | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() >= end:
                    raise Refused(
                        f"another patchset command is at work in {root}; try again when it has ended"
                    ) from None
                time.sleep(0.05)
        reached("locked")
        yield
    finally:
        os.close(fd)
