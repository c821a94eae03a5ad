# SPDX-License-Identifier: Apache-2.0
"""patches/<upstream>: the series file and the patches it names, as bytes, checked before anything is written."""

from __future__ import annotations

import fnmatch
import hashlib
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from patchset import diffs
from patchset.common import Refused
from patchset.git import Git
from patchset.pins import Upstream

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.patch")
TRAILER = re.compile(r"^(Upstream-Status|Tests|Needs|Relies-On|Drop-When|Patch-File|[A-Z][a-z-]*-by): *(.*)$")


@dataclass(frozen=True)
class Patch:
    """One patch as git's own mail reader sees it: `message` and `diff` are exactly what is committed and applied."""

    name: str
    data: bytes
    author: str
    email: str
    date: str
    subject: str
    body: str
    diff: bytes

    @property
    def message(self) -> bytes:
        return f"{self.subject}\n\n{self.body}\n".encode()

    def files(self) -> list[diffs.FileDiff]:
        """The files the diff touches (diffs.BadDiff when it holds what it may not)."""
        return diffs.parse(self.diff)


def names(up: Upstream) -> list[str]:
    """The series in order; Refused unless series and *.patch files agree both ways, without duplicates."""
    file = up.patches / "series"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    where = f"patches/{up.name}"
    for name in names:
        if not NAME.fullmatch(name):
            raise Refused(f"{where}/series: {name!r} is not the plain name of a .patch file")
        if names.count(name) > 1:
            raise Refused(f"{where}/series: {name} is listed twice")
        if not (up.patches / name).is_file() or (up.patches / name).is_symlink():
            raise Refused(f"{where}/series: {name} is not a file in {where}")
    if unlisted := {path.name for path in up.patches.glob("*.patch")} - set(names):
        raise Refused(f"{where}/{min(unlisted)} is not in {where}/series; list it there or delete it")
    return names


def hashes(up: Upstream) -> list[list[str]]:
    """[name, sha256] of each patch, in series order."""
    return [[name, hashlib.sha256((up.patches / name).read_bytes()).hexdigest()] for name in names(up)]


def load(up: Upstream) -> list[Patch]:
    """The linted series; Refused names every patch at fault and why."""
    patches = [parse(name, (up.patches / name).read_bytes()) for name in names(up)]
    lint(up, patches)
    return patches


def parse(name: str, data: bytes) -> Patch:
    """Split one mail with `git mailinfo`: encodings are undone here, once, before lint and apply look at it."""
    with tempfile.TemporaryDirectory(prefix="patchset-") as temp:
        message, diff = Path(temp, "message"), Path(temp, "diff")
        output = Git(Path(temp), Path(temp))(
            "mailinfo", "-b", "--no-scissors", "--quoted-cr=nowarn", message.name, diff.name, stdin=data
        )
        head = dict(line.split(": ", 1) for line in output.decode("utf-8", "replace").splitlines() if ": " in line)
        body = message.read_bytes().decode("utf-8", "replace").strip("\n")
        keys = ("Author", "Email", "Date", "Subject")
        author, email, date, subject = (head.get(key, "").strip() for key in keys)
        return Patch(name, data, author, email, date, subject, body, diff.read_bytes())


def lint(up: Upstream, patches: list[Patch]) -> None:
    """Check headers, paths, modes and hunks of a series; Refused lists all faults, one line each."""
    faults = [f"patches/{up.name}/{p.name}: {fault}" for p in patches for fault in (*_header(up, p), *_changes(up, p))]
    if faults:
        raise Refused("\n".join(faults))


def _header(up: Upstream, patch: Patch) -> list[str]:
    faults = [f"header without {key}" for key in ("Author", "Date", "Subject") if not getattr(patch, key.lower())]
    lines = patch.body.splitlines()
    trailers = [match.groups() for line in lines if (match := TRAILER.match(line))]
    if not any(line.strip() and not TRAILER.match(line) for line in lines):
        faults.append("header without a body that says why")
    if not any(key == "Upstream-Status" and value for key, value in trailers):
        faults.append("header without an Upstream-Status: line")
    tests = [test for key, value in trailers if key == "Tests" for test in re.split(r"[,\s]+", value) if test]
    if not tests:
        faults.append("header without a Tests: line")
    for test in tests:
        if not (up.root / test.split("::")[0]).is_file():
            faults.append(f"Tests: {test} does not exist")
    if any(key == "Patch-File" for key, _ in trailers):
        faults.append("a Patch-File: line (the tool's own mark inside vendor/; leave it out)")
    return faults


def _changes(up: Upstream, patch: Patch) -> list[str]:
    try:
        files = patch.files()
    except diffs.BadDiff as error:
        return [str(error)]
    paths = [file.path for file in files]
    faults = [f"{path} is listed twice" for path in sorted(set(paths)) if paths.count(path) > 1]
    outside = [path for path in paths if not any(fnmatch.fnmatchcase(path, glob) for glob in up.allow)]
    return faults + [f"{path} is outside what overlay.toml allows ({', '.join(up.allow)})" for path in outside]
