# SPDX-License-Identifier: Apache-2.0
"""bundle: what a release ships in dist/, usable without this repository.

Per upstream that we change: one complete diff (hooks and new files) for `git am` in a clone of the upstream, and the
patched wheel with a local version (`5.17.0+m3po.1`) for plain pip. The diff is of the upstream's *git* tree: a file
whose lines all end in CRLF in the wheel has LF there (unsloth_zoo), so the diff is written in that form.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import shutil
import tempfile
import zipfile
from pathlib import Path

from patchset import build, check, checkout, export, git, pins, series, state, wheels
from patchset.common import Drift, progress
from patchset.pins import Upstream

STAMP = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip file can hold: equal inputs give equal wheels


def bundle(root: Path, ups: list[Upstream]) -> list[str]:
    """Write dist/ anew; returns one line per file. Upstreams without patches and new files are left out."""
    number = pins.release_number(root)
    changed = [up for up in ups if series.names(up) or state.overlay_files(up)]
    local = {up.name: f"{up.version}+m3po.{number}" for up in changed}
    lines = []
    with tempfile.TemporaryDirectory(prefix="patchset-") as temp:
        staged = Path(temp, "dist")
        staged.mkdir()
        for up in changed:
            progress(f"{up.name}: bundling {local[up.name]}")
            wheels.ensure(up)
            repo = build.scratch(Path(temp, "git", up.name))
            built = build.build(repo, up, series.load(up))
            tree = full_tree(repo, up, built)
            name = f"{up.name}-{local[up.name]}"
            (staged / f"{name}.patch").write_bytes(complete_diff(repo, up, built.pristine, tree, local[up.name]))
            content = wheel(repo, up, tree, local, Path(temp, up.name))
            (staged / f"{name}-{up.wheel.split('-', 2)[2]}").write_bytes(content)
        for file in sorted(staged.iterdir()):
            lines.append(f"dist/{file.name}  {wheels.digest(file)}")
        dist = root / "dist"
        shutil.rmtree(dist, ignore_errors=True)
        shutil.copytree(staged, dist)
    return [*lines, *(f"{up.name}: nothing to bundle" for up in ups if up not in changed)]


def full_tree(repo: git.Git, up: Upstream, built: build.Built) -> str:
    """The tree id of the patched upstream with the new files in it."""
    fresh = state.overlay_files(up)
    checkout.require_free(repo, up, built.pristine, fresh)
    repo("read-tree", built.patched)
    return _with_files(repo, {path: (up.overlay / path).read_bytes() for path in fresh})


def complete_diff(repo: git.Git, up: Upstream, pristine: str, tree: str, version: str) -> bytes:
    """One mail with the whole difference, against the files as they are in the upstream's git."""
    subject = f"M3PO overlay {version}"
    why = [f"- {patch.subject} ({patch.name})" for patch in series.load(up)]
    text = "\n".join([subject, "", f"All of it, for {up.name} {up.version}:", "", *why, "- the new files", ""])
    paths = repo.names("diff-tree", "-r", "-z", "--name-only", "--no-renames", pristine, tree)
    sides = []
    for side in (pristine, tree):
        repo("read-tree", side)
        present = [path for path in paths if repo("ls-tree", side, "--", path)]
        sides.append(_with_files(repo, {p: _git_form(repo("cat-file", "blob", f"{side}:{p}")) for p in present}))
    base = repo.line("commit-tree", sides[0], "-m", up.version)
    commit = repo("commit-tree", sides[1], "-p", base, stdin=text.encode()).decode().strip()
    return repo("format-patch", *export.FORMAT, commit)


def wheel(repo: git.Git, up: Upstream, tree: str, local: dict[str, str], temp: Path) -> bytes:
    """The patched wheel: the files of `tree`, another version in the metadata, a new RECORD."""
    folder = check.write_tree(up, repo, tree, [], temp)
    executable = {entry.path for entry in wheels.read(up) if entry.mode == "100755"}
    old, new = (f"{up.name}-{version}.dist-info/" for version in (up.version, local[up.name]))
    rows, buffer = [], io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()):
            if name.startswith(".git/") or name == f"{old}RECORD":
                continue
            data = (folder / name).read_bytes()
            data = metadata(data, up, local) if name == f"{old}METADATA" else data
            mode = "100755" if up.inside(name) in executable else "100644"
            name = new + name.removeprefix(old) if name.startswith(old) else name
            _add(archive, name, mode, data)
            hashed = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            rows.append(f"{name},sha256={hashed},{len(data)}")
        rows.append(f"{new}RECORD,,")
        _add(archive, f"{new}RECORD", "100644", ("\n".join(rows) + "\n").encode())
    return buffer.getvalue()


def metadata(data: bytes, up: Upstream, local: dict[str, str]) -> bytes:
    """METADATA with the local version; what it requires of the other changed upstreams is pinned to theirs.

    Raises:
        Drift: there is no line with the version.
    """
    head, gap, body = data.partition(b"\n\n")
    head, count = re.subn(rb"(?m)^Version: .*$", f"Version: {local[up.name]}".encode(), head)
    if count != 1:
        raise Drift(f"{up.name}: METADATA of {up.wheel} does not have one line with the version")
    for name, version in local.items():
        # Only the unconditional requirement: extras keep theirs, which the pinned version satisfies.
        line = rf"(?m)^Requires-Dist: {name}(?![\w.-])[^;\n]*$".encode()
        head = re.sub(line, f"Requires-Dist: {name}=={version}".encode(), head)
    return head + gap + body


def _add(archive: zipfile.ZipFile, name: str, mode: str, data: bytes) -> None:
    entry = zipfile.ZipInfo(name, STAMP)
    entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, int(mode, 8) << 16
    archive.writestr(entry, data)


def _git_form(data: bytes) -> bytes:
    """A file with CRLF line ends throughout with LF ones; any other as it is."""
    return data.replace(b"\r\n", b"\n") if data.count(b"\r\n") == data.count(b"\n") else data


def _with_files(repo: git.Git, files: dict[str, bytes]) -> str:
    """The index with these contents written over it, as a tree id; modes stay, new files are plain."""
    lines = []
    for path, data in files.items():
        known = repo("ls-files", "-s", "--", path).decode().split(" ", 1)[0] or "100644"
        blob = repo("hash-object", "-w", "--stdin", "--no-filters", stdin=data).decode().strip()
        lines.append(f"{known} {blob}\t".encode() + os.fsencode(path))
    repo("update-index", "--add", "-z", "--index-info", stdin=b"".join(line + b"\0" for line in lines))
    return repo.line("write-tree")
