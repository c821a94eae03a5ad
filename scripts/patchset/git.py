# SPDX-License-Identifier: Apache-2.0
"""One way to call git, deaf to the user's configuration, hooks, attributes, locale and inherited GIT_* variables."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from patchset.common import Refused

IDENTITY = "patchset <patchset@localhost>"
EPOCH = "946684800 +0000"  # every date the tool chooses itself: commit ids must not depend on the day
# Shipped .gitattributes would rewrite bytes on checkout or change hunk headers; this file outranks them.
ATTRIBUTES = "* -text !eol -ident !filter !diff !merge !working-tree-encoding\n"
OPTIONS = (
    "core.autocrlf=false", "core.safecrlf=false", "core.hooksPath=/dev/null", "core.attributesFile=/dev/null",
    "core.excludesFile=/dev/null", "core.fsmonitor=false", "core.quotePath=true", "core.fileMode=true",
    "core.symlinks=true", "core.compression=1", "commit.gpgSign=false", "gc.auto=0", "core.fsync=none",
)  # fmt: skip


class GitError(Refused):
    """git failed; `stderr` is what it said."""

    def __init__(self, command: str, stderr: str) -> None:
        super().__init__(f"git {command} failed: {stderr.strip() or 'no message'}")
        self.stderr = stderr


def environment() -> dict[str, str]:
    """The process environment without GIT_* and without anything that changes git's output."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") and k not in ("LANGUAGE", "LC_MESSAGES")}
    name, _, email = IDENTITY.rstrip(">").partition(" <")
    for who in ("AUTHOR", "COMMITTER"):
        env |= {f"GIT_{who}_NAME": name, f"GIT_{who}_EMAIL": email, f"GIT_{who}_DATE": EPOCH}
    env |= {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1"}
    env |= {"GIT_ATTR_NOSYSTEM": "1", "GIT_NO_REPLACE_OBJECTS": "1", "GIT_TERMINAL_PROMPT": "0"}
    return env | {"LC_ALL": "C", "TZ": "UTC"}


class Git:
    """git on one explicit repository, never one found by walking up; `index` and `objects` may lie elsewhere."""

    def __init__(self, git_dir: Path, work_tree: Path, index: Path | None = None, objects: Path | None = None) -> None:
        self.git_dir, self.work_tree = git_dir, work_tree
        places = {"GIT_DIR": git_dir, "GIT_WORK_TREE": work_tree, "GIT_CEILING_DIRECTORIES": work_tree.parent}
        places |= {"GIT_INDEX_FILE": index} if index else {}
        places |= {"GIT_OBJECT_DIRECTORY": objects} if objects else {}
        self.env = {key: str(place) for key, place in places.items()}

    def __call__(
        self, *args: str, stdin: bytes = b"", ok: tuple[int, ...] = (0,), env: dict[str, str] | None = None
    ) -> bytes:
        """Run one command and return its stdout; GitError when the exit status is not in `ok`."""
        return self._run(args, stdin, ok, env).stdout

    def talk(self, *args: str, stdin: bytes = b"") -> str:
        """Run one command and return what it said on stderr."""
        return self._run(args, stdin, (0,), None).stderr.decode(errors="replace")

    def _run(
        self, args: tuple[str, ...], stdin: bytes, ok: tuple[int, ...], env: dict[str, str] | None
    ) -> subprocess.CompletedProcess[bytes]:
        command = ["git", *(part for option in OPTIONS for part in ("-c", option)), *args]
        whole = environment() | self.env | (env or {})
        done = subprocess.run(command, input=stdin, capture_output=True, cwd=self.work_tree, env=whole, close_fds=False)
        if done.returncode not in ok:
            raise GitError(args[0], done.stderr.decode(errors="replace"))
        return done

    def line(self, *args: str) -> str:
        """A command's output as text, without the newline."""
        return self(*args).decode().strip()

    def names(self, *args: str) -> list[str]:
        """The NUL-separated names a command prints (its -z form)."""
        return [os.fsdecode(name) for name in self(*args).split(b"\0") if name]


def init(folder: Path) -> Path:
    """Make an empty repository whose own settings protect bytes; returns its git directory."""
    git_dir = folder / ".git"
    git_dir.mkdir(parents=True)
    git = Git(git_dir, folder)
    git("init", "-q", "-b", "main", "--template=")
    git("config", "core.autocrlf", "false")
    (git_dir / "info").mkdir()
    (git_dir / "info" / "attributes").write_text(ATTRIBUTES)
    return git_dir


def require() -> None:
    """Refuse to work without git 2.39 or newer."""
    try:
        text = subprocess.run(["git", "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        raise Refused("git is not installed or does not run; install git 2.39 or newer") from None
    version = re.search(r"(\d+)\.(\d+)", text)
    if not version or (int(version[1]), int(version[2])) < (2, 39):
        raise Refused(f"git 2.39 or newer is needed; this is {text.strip()}")
