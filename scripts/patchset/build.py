# SPDX-License-Identifier: Apache-2.0
"""Pristine and patched commits, made in a scratch repository without touching any work tree.

Patches go through `git apply --cached` on an explicit index: inside an ignored folder of another repository a plain
`git apply` does nothing and exits 0. Dates and committer are fixed, so equal inputs give equal commit ids.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from patchset import git, wheels
from patchset.common import Drift, progress, reached
from patchset.pins import Upstream
from patchset.series import Patch


@dataclass(frozen=True)
class Built:
    """Commit ids of the pristine and the patched tree, and the latter's tree id."""

    pristine: str
    patched: str
    tree: str


def scratch(folder: Path, objects: Path | None = None) -> git.Git:
    """A repository with an empty work tree in `folder`, emptied first; `objects` may name another's object store."""
    shutil.rmtree(folder, ignore_errors=True)
    return git.Git(git.init(folder), folder, objects=objects)


def import_wheel(repo: git.Git, up: Upstream, ref: str = "refs/patchset/pristine") -> str:
    """Commit the verified wheel's files (bytes as shipped, whatever .gitignore they bring) as `ref`; its commit id."""
    entries = wheels.read(up)
    progress(f"{up.name} {up.version}: importing {len(entries)} files")
    text = f"{up.name} {up.version}\n\nWheel: {up.wheel}\nSHA-256: {up.sha256}\n".encode()
    who = f"{git.IDENTITY} {git.EPOCH}"
    parts = [f"commit {ref}\nauthor {who}\ncommitter {who}\ndata {len(text)}\n".encode(), text, b"\n"]
    for entry in entries:
        name = entry.path.replace('"', '\\"')
        parts += [f'M {entry.mode} inline "{name}"\ndata {len(entry.data)}\n'.encode(), entry.data, b"\n"]
    repo("fast-import", "--quiet", "--force", "--date-format=raw", stdin=b"".join(parts))
    return repo.line("rev-parse", ref)


def apply_series(repo: git.Git, up: Upstream, pristine: str, patches: list[Patch]) -> Built:
    """Commit each patch on top of `pristine`; Drift names patch, file and hunk of the first that does not apply."""
    repo("read-tree", pristine)
    commit, tree = pristine, repo.line("rev-parse", f"{pristine}^{{tree}}")
    for patch in patches:
        try:
            repo("apply", "--cached", "--whitespace=nowarn", "-", stdin=patch.diff)
        except git.GitError as error:
            raise Drift(_conflict(repo, up, patch, error.stderr)) from None
        tree = repo.line("write-tree")
        who = {"AUTHOR_NAME": patch.author, "AUTHOR_EMAIL": patch.email, "AUTHOR_DATE": patch.date}
        env = {f"GIT_{key}": value for key, value in (who | {"COMMITTER_DATE": patch.date}).items()}
        message = patch.message + f"Patch-File: {patch.name}\n".encode()
        commit = repo("commit-tree", tree, "-p", commit, stdin=message, env=env).decode().strip()
    return Built(pristine, commit, tree)


def _conflict(repo: git.Git, up: Upstream, patch: Patch, output: str) -> str:
    """What git said, the hunk it means, the likely cause, and what to do."""
    where = f"patches/{up.name}/{patch.name}"
    lines = [
        f"{up.name}: conflict: {where} does not apply",
        *(f"  git: {line}" for line in output.strip().splitlines()),
    ]
    for file, number in re.findall(r"patch failed: (.+):(\d+)", output):
        part = patch.diff.partition(f"+++ b/{file}".encode())[2].partition(b"\ndiff --git ")[0]
        for hunk in re.findall(rb"^@@ -%d[, ].*" % int(number), part, re.MULTILINE):
            lines.append(f"  hunk: {file}: {hunk.decode('utf-8', 'replace')}")
        if b"\r\n" in repo("show", f":{file}", ok=(0, 128)) and b"\r\n" not in part:
            lines.append(f"  {file} has CRLF line ends, the patch has LF ones: something rewrote the patch")
    lines += [
        f"vendor/{up.name} is unchanged. Ways out:",
        f"  1. if the patch file was changed by mistake, restore it: git checkout -- {where}",
        f"  2. else take its line out of patches/{up.name}/series, keep a copy, and delete the file; apply;",
        f"     make the change in vendor/{up.name}, commit it there with the same message; export",
    ]
    return "\n".join(lines)


def build(repo: git.Git, up: Upstream, patches: list[Patch], pristine: str | None = None) -> Built:
    """Pristine commit (imported from the wheel unless `pristine` names one in the object store) and series."""
    pristine = pristine or import_wheel(repo, up)
    reached("pristine-built")
    built = apply_series(repo, up, pristine, patches)
    reached("series-built")
    return built
