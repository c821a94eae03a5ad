# SPDX-License-Identifier: Apache-2.0
"""A strict reader of git diffs. What it does not know it refuses, so that lint and `git apply` see the same changes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from patchset.common import path_fault

FORBIDDEN = (
    (rb"GIT binary patch|Binary files ", "binary"),
    (rb"new file mode", "a new file belongs in overlay/, not in a patch"),
    (rb"(rename|copy) (from|to) |(dis)?similarity index ", "a rename or copy"),
)
HUNK = re.compile(rb"@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@")


class BadDiff(ValueError):
    """The diff holds something a patch of ours may not hold."""


@dataclass
class FileDiff:
    """The changes to one file: its path, whether it is deleted, and per hunk the removed and the added lines."""

    path: str
    deleted: bool = False
    hunks: list[tuple[list[bytes], list[bytes]]] = field(default_factory=list)

    @property
    def added(self) -> int:
        return sum(len(new) for _, new in self.hunks)

    @property
    def removed(self) -> int:
        return sum(len(old) for old, _ in self.hunks)


def parse(diff: bytes) -> list[FileDiff]:
    """The files of a diff in order; BadDiff for renames, new files, binaries, odd modes, unsafe paths and noise."""
    lines = re.sub(rb"\n-- \n[^\n]*\n*\Z", b"\n", diff).split(b"\n")  # a mailer's signature
    if lines.pop() != b"":
        raise BadDiff("does not end with a newline")
    files: list[FileDiff] = []
    at = 0
    while at < len(lines):
        line = lines[at]
        if line.startswith(b"diff --git "):
            files.append(FileDiff(_same_name(line)))
        elif not files and (line in (b"", b"---") or line.startswith(b" ")):
            pass  # the separator and a diffstat before the first file
        elif line.startswith(b"@@ ") and files:
            at = _hunk(lines, at, files[-1])
            continue
        elif files and line != b"":
            _header(line, files[-1])
        elif line != b"" or any(lines[at:]):
            raise BadDiff(f"line {at + 1} is no part of a git diff: {line[:60]!r}")
        at += 1
    if not files or not all(file.hunks for file in files):
        raise BadDiff("holds no change, a bare change of mode, or an empty file")
    return files


def _same_name(line: bytes) -> str:
    """The path of `diff --git a/P b/P`; quoted and differing names are refused."""
    names = line.removeprefix(b"diff --git ")
    half = len(names) // 2
    old, new = names[:half], names[half + 1 :]
    if not (old.startswith(b"a/") and new.startswith(b"b/") and old[2:] == new[2:] and names[half : half + 1] == b" "):
        raise BadDiff(f"a rename, a quoted name, or not under a/ and b/: {names!r}")
    path = old[2:].decode("utf-8", "replace")
    if fault := path_fault(path):
        raise BadDiff(f"{fault}: {path!r}")
    if not path.isascii():
        raise BadDiff(f"a name that is not plain ASCII: {path!r}")
    return path


def _header(line: bytes, file: FileDiff) -> None:
    """Check one line between `diff --git` and the first hunk, or between two files."""
    for pattern, reason in FORBIDDEN:
        if re.match(pattern, line):
            raise BadDiff(f"{file.path}: {reason}")
    mode = re.fullmatch(rb"(?:index [0-9a-f]+\.\.[0-9a-f]+|old mode|new mode|(deleted file mode)) (\d+)", line)
    if mode and mode[2] not in (b"100644", b"100755"):
        raise BadDiff(f"{file.path}: mode {mode[2].decode()} (only 100644 and 100755: no symlinks, no submodules)")
    file.deleted |= bool(mode and mode[1])
    new = b"+++ /dev/null" if file.deleted else b"+++ b/" + file.path.encode()
    names = () if file.hunks else (b"--- a/" + file.path.encode(), new)
    if not (mode or line in names or re.fullmatch(rb"index [0-9a-f]+\.\.[0-9a-f]+", line)):
        raise BadDiff(f"{file.path}: not a header line of its diff: {line[:60]!r}")


def _hunk(lines: list[bytes], at: int, file: FileDiff) -> int:
    """Read the hunk whose header is lines[at]; returns the index after it."""
    head = HUNK.match(lines[at])
    if not head:
        raise BadDiff(f"{file.path}: malformed hunk header {lines[at][:60]!r}")
    left, right = int(head[1] or 1), int(head[2] or 1)
    old: list[bytes] = []
    new: list[bytes] = []
    at += 1
    while at < len(lines) and (left or right or lines[at][:1] == b"\\"):
        kind, text = lines[at][:1], lines[at][1:]
        if kind not in (b" ", b"-", b"+", b"\\"):
            break
        left -= kind in (b" ", b"-")
        right -= kind in (b" ", b"+")
        old += [text] if kind == b"-" else []
        new += [text] if kind == b"+" else []
        at += 1
    if left or right:
        raise BadDiff(f"{file.path}: a hunk is cut off or its counts are wrong")
    if any(b"\0" in text for text in old + new):
        raise BadDiff(f"{file.path}: binary")
    if b"".join(b"".join(old).split()) == b"".join(b"".join(new).split()):
        raise BadDiff(f"{file.path}: a hunk that changes only whitespace")
    file.hunks.append((old, new))
    return at
