# SPDX-License-Identifier: Apache-2.0
"""The pinned wheels: downloaded by hash into .cache/wheels, verified by hash and by their own RECORD, read safely."""

from __future__ import annotations

import base64
import csv
import hashlib
import os
import re
import stat
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

from patchset.common import Refused, path_fault, progress
from patchset.pins import Upstream

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


@dataclass(frozen=True)
class Entry:
    """One file of a wheel: checkout path, git mode (100644 or 100755), bytes."""

    path: str
    mode: str
    data: bytes


def digest(file: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def verify(up: Upstream) -> bool:
    """Whether the wheel lies in the cache with the pinned hash; a file with another hash is refused, never replaced."""
    if not up.wheel_file.exists():
        return False
    if digest(up.wheel_file) != up.sha256:
        raise Refused(
            f"{up.name}: .cache/wheels/{up.wheel} has not the sha256 pinned in overlay.toml; "
            "delete the file to have it downloaded again"
        )
    return True


def ensure(up: Upstream) -> None:
    """Download the wheel with pip, by hash, unless it is cached; nothing else in the tool uses a network."""
    if verify(up):
        return
    progress(f"{up.name}: downloading {up.wheel}")
    folder = up.wheel_file.parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="tmp-") as temp:
        got = _download(f"{up.name}=={up.version} --hash=sha256:{up.sha256}", Path(temp), "--require-hashes")
        if got.name != up.wheel:
            raise Refused(f"{up.name}: the index offers {got.name} instead of {up.wheel}")
        os.replace(got, up.wheel_file)
    verify(up)


def release(up: Upstream, version: str, folder: Path) -> Upstream:
    """The same upstream in another version, its wheel taken from the cache or downloaded into `folder`."""
    if not re.fullmatch(r"[A-Za-z0-9.!_-]+", version):
        raise Refused(f"{up.name}: {version!r} is not a version")
    file = next(iter(up.wheel_file.parent.glob(f"{up.name}-{version}-*.whl")), None)
    if file is None:
        progress(f"{up.name}: downloading {version}")
        folder.mkdir(parents=True, exist_ok=True)
        file = _download(f"{up.name}=={version}", folder)
    return replace(up, version=version, wheel=file.name, sha256=digest(file), wheel_file=file)


def newest(up: Upstream, count: int) -> list[str]:
    """The newest `count` versions that the index offers for this Python, newest first, without pre-releases."""
    command = [*PIP, "index", "versions", up.name]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", close_fds=False)
    match = re.search(r"^Available versions: (.+)$", done.stdout, re.MULTILINE)
    if done.returncode or not match:
        reason = (done.stderr.strip().splitlines() or ["it named no versions"])[-1]
        raise Refused(f"{up.name}: could not ask the package index for its versions: {reason}")
    return match[1].split(", ")[:count]


def _download(requirement: str, folder: Path, *options: str) -> Path:
    """The one wheel that pip finds for a requirement, in `folder`, which holds nothing else of that kind."""
    wants = folder / "requirements.txt"
    wants.write_text(f"{requirement}\n", encoding="utf-8")
    before = set(folder.glob("*.whl"))
    command = [*PIP, "download", "-q", "--no-deps", "--only-binary", ":all:", *options]
    command += ["-d", str(folder), "-r", str(wants)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", close_fds=False)
    got = set(folder.glob("*.whl")) - before
    if done.returncode or len(got) != 1:
        reason = (done.stderr.strip().splitlines() or ["no such file was offered"])[-1]
        raise Refused(
            f"could not download {requirement.split(' ')[0]}: {reason} "
            "(without a network, put the wheel into .cache/wheels by hand)"
        )
    return got.pop()


def read(up: Upstream) -> list[Entry]:
    """Every file of the verified wheel, sorted; Refused when a name is unsafe or RECORD and contents disagree."""
    try:
        with zipfile.ZipFile(up.wheel_file) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
            names = [info.filename for info in infos]
            for info in infos:
                _check_name(up, info)
            if len(set(names)) != len(names):
                raise Refused(f"{up.name}: {up.wheel} holds a name twice")
            files = {info.filename: archive.read(info) for info in infos}
    except (zipfile.BadZipFile, OSError) as error:
        raise Refused(f"{up.name}: {up.wheel} cannot be read: {error}") from None
    _check_record(up, files)
    modes = {i.filename: "100755" if (i.external_attr >> 16) & 0o111 else "100644" for i in infos}
    return [Entry(up.inside(name), modes[name], files[name]) for name in sorted(files)]


def _check_name(up: Upstream, info: zipfile.ZipInfo) -> None:
    name = info.orig_filename
    fault = path_fault(name)
    kind = stat.S_IFMT(info.external_attr >> 16)
    if not fault and kind not in (0, stat.S_IFREG):
        fault = "not a plain file"
    if not fault and name.split("/")[0].endswith(".data"):
        fault = "a .data folder, which this tool does not spread"
    if fault:
        raise Refused(f"{up.name}: {up.wheel} holds {name!r}: {fault}")


def _check_record(up: Upstream, files: dict[str, bytes]) -> None:
    records = [name for name in files if name.endswith(".dist-info/RECORD") and name.count("/") == 1]
    if len(records) != 1:
        raise Refused(f"{up.name}: {up.wheel} has no RECORD, or several")
    rows = list(csv.reader(files[records[0]].decode("utf-8").splitlines()))
    listed = {row[0]: row[1] for row in rows if len(row) == 3}
    odd = set(listed) ^ set(files)
    if odd or len(rows) != len(listed):
        raise Refused(f"{up.name}: RECORD and contents of {up.wheel} disagree about {min(odd, default='a name twice')}")
    for name, recorded in listed.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest()).rstrip(b"=").decode()
        if name != records[0] and recorded != f"sha256={digest}":
            raise Refused(f"{up.name}: {name} in {up.wheel} differs from the wheel's own RECORD")
