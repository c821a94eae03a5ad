# SPDX-License-Identifier: Apache-2.0
"""A tiny project with two upstreams whose wheels are built on the spot; no test here needs a network.

The folder's name holds a space and a non-ASCII letter, and the project lies in an ignored folder of another git
repository, in every test: both have broken overlay tools before.
"""

from __future__ import annotations

import base64
import contextlib
import difflib
import hashlib
import io
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from patchset import cli

SCRIPTS = Path(cli.__file__).parents[1]
TEN = b"".join(b"line_%d = %d\n" % (n, n) for n in range(10))
ALPHA = {
    "alpha/__init__.py": b"VALUE = 1\n",
    "alpha/core.py": TEN,
    "alpha/dos.py": TEN.replace(b"\n", b"\r\n"),
    "alpha/mixed.py": b"a = 1\r\nb = 2\nc = 3\r\nlast = 4",
    "alpha/hidden/secret.log": b"shipped although ignored\n",
    "alpha/ident.py": b"# $Id$\r\nx = 1\n",
    "alpha/run.sh": b"#!/bin/sh\n",
    ".gitignore": b"*.log\nhidden/\n",
    ".gitattributes": b"* text=auto eol=lf ident\n*.py diff=python\n",
}
BETA = {"beta/__init__.py": b"VALUE = 2\n", "beta/loop.py": TEN}
WHY = "Why this is needed, and why no milder rung served.\n"
HEADER = "{subject}\n\n" + WHY + "\nUpstream-Status: Pending\nTests: tests/test_it.py\n"


@dataclass
class Result:
    """What one command did."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


class Project:
    """The project under test, with the verbs that the tests speak in."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "tests").mkdir(parents=True)
        (root / "tests" / "test_it.py").write_text("def test_it(): pass\n")
        self.pins: dict[str, str] = {}
        self.wheel("alpha", ALPHA, prefix="src")
        self.wheel("beta", BETA, prefix=".")

    def wheel(self, name: str, files: dict[str, bytes], *, prefix: str, version: str = "1.0", record: str = "") -> Path:
        """Build a wheel in the cache and pin it; `record` replaces the RECORD that would be right."""
        info = f"{name}-{version}.dist-info"
        files = files | {
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        rows = [
            f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}"
            for path, data in files.items()
        ]
        files[f"{info}/RECORD"] = (record or "\n".join([*rows, f"{info}/RECORD,,"]) + "\n").encode()
        file = self.root / ".cache" / "wheels" / f"{name}-{version}-py3-none-any.whl"
        file.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(file, "w") as archive:
            for path, data in files.items():
                entry = zipfile.ZipInfo(path, (2026, 1, 1, 0, 0, 0))
                entry.external_attr = (0o100755 if path.endswith(".sh") else 0o100666) << 16
                archive.writestr(entry, data)
        self.pin(name, file, prefix, version)
        return file

    def pin(self, name: str, file: Path, prefix: str, version: str = "1.0") -> None:
        """Write overlay.toml with this wheel's present hash."""
        inside = name if prefix == "." else f"{prefix}/{name}"
        self.pins[name] = (
            f'[upstream.{name}]\nversion = "{version}"\nwheel = "{file.name}"\n'
            f'sha256 = "{hashlib.sha256(file.read_bytes()).hexdigest()}"\nprefix = "{prefix}"\nlicense = "MIT"\n'
            f'allow = ["{inside}/*"]\nimports = ["{name}"]\n'
        )
        (self.root / "overlay.toml").write_text("\n".join(self.pins.values()))

    def run(self, *args: str) -> Result:
        """Call the tool in this process."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main([*args, "--root", str(self.root)])
        return Result(code, out.getvalue(), err.getvalue())

    def ok(self, *args: str) -> Result:
        """Call the tool; it must succeed."""
        result = self.run(*args)
        assert result.code == 0, result.text
        return result

    def start(self, *args: str, prefix: Sequence[str] = (), **env: str) -> subprocess.Popen[bytes]:
        """Start the tool as a process of its own, in its own group."""
        command = [*prefix, sys.executable, "-m", "patchset", *args, "--root", str(self.root)]
        everything = os.environ | {"PYTHONPATH": str(SCRIPTS)} | env
        return subprocess.Popen(command, env=everything, stderr=subprocess.PIPE, start_new_session=True)

    def vendor(self, path: str, name: str = "alpha") -> Path:
        return self.root / "vendor" / name / path

    def git(self, *args: str, name: str = "alpha") -> str:
        """Plain git in a checkout, as a developer calls it."""
        who = ["-c", "user.name=Dévi Löper", "-c", "user.email=d@example.org"]
        who += ["-c", "commit.gpgSign=false", "-c", "core.hooksPath=.git/hooks"]
        command = ["git", "-C", str(self.root / "vendor" / name), *who, *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self, subject: str, *args: str) -> None:
        """Commit everything in vendor/alpha with a complete header."""
        self.git("-c", "core.excludesFile=", "add", "-A")
        self.git("commit", "-q", "-m", HEADER.format(subject=subject), *args)

    def edit(self, path: str, old: bytes, new: bytes, name: str = "alpha") -> None:
        """Replace bytes in a file of the checkout."""
        file = self.vendor(path, name)
        assert old in file.read_bytes()
        file.write_bytes(file.read_bytes().replace(old, new))

    def series(self, *patches: tuple[str, bytes], name: str = "alpha") -> None:
        """Write patches/<name> with exactly these patches."""
        folder = self.root / "patches" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for file, data in patches:
            (folder / file).write_bytes(data)
        (folder / "series").write_text("".join(f"{file}\n" for file, _ in patches))

    def patches(self) -> dict[str, bytes]:
        """Every file under patches/."""
        folder = self.root / "patches"
        return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    def tree(self, name: str = "alpha") -> dict[str, bytes]:
        """Every file of a checkout but .git: path -> bytes."""
        return {path: self.vendor(path, name).read_bytes() for path in self.stamps(name)}

    def stamps(self, name: str = "alpha") -> dict[str, tuple[int, int]]:
        """Every file of a checkout but .git: path -> (inode, mtime in ns)."""
        top = self.root / "vendor" / name
        found = {}
        for file in sorted(top.rglob("*")):
            path = file.relative_to(top).as_posix()
            if not file.is_dir() and not path.startswith(".git/"):
                found[path] = (file.lstat().st_ino, file.lstat().st_mtime_ns)
        return found


def blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def diff(path: str, old: bytes, new: bytes) -> bytes:
    """The canonical git diff of one file, written without git."""
    a, b = ([line.decode("latin-1") for line in data.splitlines(keepends=True)] for data in (old, new))
    text = "".join(difflib.unified_diff(a, b, f"a/{path}", f"b/{path}")).encode("latin-1")
    return f"diff --git a/{path} b/{path}\nindex {blob(old)}..{blob(new)} 100644\n".encode() + text


def mail(body: bytes, subject: str = "core: change a line", header: str = HEADER) -> bytes:
    """A whole patch: canonical mail header, message, diff."""
    head = f"From {'0' * 40} Mon Sep 17 00:00:00 2001\nFrom: M3PO overlay <overlay@m3po.invalid>\n"
    head += "Date: Mon, 5 Jan 2026 10:00:00 +0100\nSubject: "
    return head.encode() + header.format(subject=subject).encode() + b"\n" + body


@pytest.fixture
def one() -> bytes:
    """A patch to alpha's core.py."""
    return mail(diff("src/alpha/core.py", TEN, TEN.replace(b"line_1 = 1\n", b"line_1 = 11\n")))


@pytest.fixture
def two() -> bytes:
    """A second patch, to the line that the first one wrote."""
    first = TEN.replace(b"line_1 = 1\n", b"line_1 = 11\n")
    change = diff("src/alpha/core.py", first, first.replace(b"line_1 = 11\n", b"line_1 = 12\n"))
    return mail(change, "core: change it again")


@pytest.fixture
def crlf() -> bytes:
    """A patch to the file with CRLF line ends."""
    old = ALPHA["alpha/dos.py"]
    return mail(diff("src/alpha/dos.py", old, old.replace(b"line_3 = 3\r\n", b"line_3 = 33\r\n")), "dos: change a line")


@pytest.fixture
def tools() -> dict[str, object]:
    """What tests need to write patches and wheels of their own."""
    return {"mail": mail, "diff": diff, "TEN": TEN, "ALPHA": ALPHA, "HEADER": HEADER}


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[list[str]]:
    """What starts a command so that file permissions bind it, even if the tests run as root: then without that right.

    Afterwards what a test made unwritable can be removed again.
    """
    right = "--bounding-set=-dac_override,-dac_read_search,-fowner"
    yield ["setpriv", right] if os.geteuid() == 0 else []
    subprocess.run(["chmod", "-R", "u+w", tmp_path], check=True)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """The tiny project, inside an ignored folder of an outer repository, under a hostile user configuration."""
    home = tmp_path / "home"
    (home / ".config" / "git").mkdir(parents=True)
    (home / ".gitconfig").write_text(
        "[core]\n\tautocrlf = true\n\tquotePath = false\n\thooksPath = /nonexistent\n\tfileMode = false\n"
        "[diff]\n\tnoprefix = true\n\talgorithm = patience\n\trenames = copies\n\tcontext = 1\n"
        "[format]\n\tsubjectPrefix = HOSTILE\n\tnumbered = true\n\tsignature = hostile\n\tsignOff = true\n"
        "[commit]\n\tgpgSign = true\n[am]\n\tthreeWay = true\n[apply]\n\twhitespace = fix\n[core]\n\teol = crlf\n"
    )
    (home / ".config" / "git" / "attributes").write_text("* text=auto eol=crlf\n")
    (home / ".config" / "git" / "ignore").write_text("*.py\n")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / ".config"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    outer = tmp_path / "outer"
    subprocess.run(["git", "init", "-q", str(outer)], check=True)
    (outer / ".gitignore").write_text("*\n")
    return Project(outer / "the projéct")
