# SPDX-License-Identifier: Apache-2.0
"""vendor/<upstream>: what differs from the record, links to the new files, and the swap that survives a kill.

A new tree is built beside the old one and moved in by rename. `inspect` compares the work tree with the patched tree
through a private index: git's stat cache (size, mtime, ctime, inode) decides which files are read again, so a byte
changed behind a restored mtime is still found, by its ctime. It never looks at the developer's index.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from patchset import git, state
from patchset.build import Built
from patchset.common import Refused, reached
from patchset.pins import Upstream

EXCLUDES = ("__pycache__/", "*.pyc", "*.egg-info/")
BUSY = ("rebase-merge", "rebase-apply", "MERGE_HEAD", "CHERRY_PICK_HEAD", "REVERT_HEAD")


@dataclass
class View:
    """A checkout against its record."""

    record: state.Record | None = None  # None: no checkout
    edited: dict[str, str] = field(default_factory=dict)  # path -> M, D, T or ? (stray)
    committed: bool = False  # HEAD's tree is not the recorded one
    busy: str | None = None  # the mark of a half-done rebase, merge or cherry-pick


def recover(root: Path) -> None:
    """Finish or undo what a killed command left: the old tree comes back when the new one was not in place yet."""
    for remainder in sorted((root / "vendor" / ".patchset").glob("*")):
        what, _, name = remainder.name.partition("-")
        if what == "old" and not (root / "vendor" / name).exists():
            remainder.rename(root / "vendor" / name)
        else:
            shutil.rmtree(remainder.rename(remainder.with_name(f"trash-{name}.{os.getpid()}")))
    reached("recovered")


def inspect(up: Upstream) -> View:
    """Compare the checkout with its record; an absent checkout gives an empty View, a foreign one is refused."""
    if not os.path.lexists(up.checkout):
        return View()
    record = state.load(up.git_dir)
    if record is None:
        raise Refused(f"vendor/{up.name} was not made by this tool, or its .git/patchset.json is broken; move it away")
    committed = git.Git(up.git_dir, up.checkout).line("rev-parse", "HEAD^{tree}") != record.tree
    busy = next((mark for mark in BUSY if (up.git_dir / mark).exists()), None)
    return View(record, differences(up, record, record.patched), committed, busy)


@contextlib.contextmanager
def private_index(up: Upstream, name: str) -> Iterator[Path]:
    """An index beside the developer's in the checkout's .git, or a copy elsewhere for who may not write there."""
    index = up.git_dir / name
    if os.access(up.git_dir, os.W_OK):
        index.with_name(f"{name}.lock").unlink(missing_ok=True)
        yield index
        return
    with tempfile.TemporaryDirectory(prefix="patchset-") as temp:
        if index.exists():
            shutil.copy2(index, temp)
        yield Path(temp, name)


def differences(up: Upstream, record: state.Record, commit: str) -> dict[str, str]:
    """path -> M, D, T or ? of everything in the work tree that is neither in `commit` nor a right link."""
    name = "patchset.index" if commit == record.patched else "patchset.other.index"
    with private_index(up, name) as index:
        repo = git.Git(up.git_dir, up.checkout, index)
        if not index.exists() or commit != record.patched:
            repo("read-tree", commit)
        repo("update-index", "-q", "--really-refresh", ok=(0, 1))
        fields = repo.names("diff-files", "-z", "--name-status", "--no-renames")
        tracked = set(repo.names("ls-files", "-z")) if record.inputs.overlay else set()
        others = repo.names("ls-files", "-z", "--others", *(f"--exclude={glob}" for glob in EXCLUDES))
    edits = dict(zip(fields[1::2], fields[::2], strict=True))
    edits |= {p: mark for p in record.inputs.overlay if p not in tracked and (mark := _link_fault(up, p))}
    for path in others:
        linked = path in record.inputs.overlay or ((up.overlay / path).is_file() and not _link_fault(up, path))
        edits |= {} if linked else {path: "?"}
    return edits


def target(up: Upstream, path: str) -> str:
    """The relative link from the checkout's `path` to its file under overlay/."""
    return os.path.relpath(up.overlay.resolve() / path, (up.checkout.parent.resolve() / up.name / path).parent)


def _link_fault(up: Upstream, path: str) -> str:
    """'' when the checkout holds the link (or a plain file with the same bytes), else a status letter."""
    link, file = up.checkout / path, up.overlay / path
    if link.is_symlink():
        return "" if os.readlink(link) == target(up, path) else "M"
    if not link.exists():
        return "D" if file.exists() else ""
    return "" if link.is_file() and file.is_file() and link.read_bytes() == file.read_bytes() else "M"


def require_free(repo: git.Git, up: Upstream, pristine: str, paths: list[str]) -> None:
    """Refuse new files where upstream has a file, or a file in place of a folder."""
    tracked_paths = set(repo.names("ls-tree", "-r", "-z", "--name-only", pristine)) if paths else set()
    folders = {str(parent) for name in tracked_paths for parent in Path(name).parents} if paths else set()
    for path in paths:
        if path in tracked_paths | folders or any(str(parent) in tracked_paths for parent in Path(path).parents):
            raise Refused(f"overlay/{up.name}/{path}: upstream {up.version} has that path; rename it or write a patch")


def sync_links(up: Upstream, tree: Path, old: dict[str, str], new: dict[str, str]) -> None:
    """Make the links in `tree` those of `new`; each link changes in one step, right ones are not touched."""
    for link in (tree / path for path in sorted(old.keys() - new.keys())):
        link.unlink(missing_ok=True)
        shutil.rmtree(link.parent / "__pycache__", ignore_errors=True)  # else the folder stays, as a namespace package
        with contextlib.suppress(OSError):
            os.removedirs(link.parent)
    for path in sorted(new):
        link, destination = tree / path, target(up, path)
        if not (link.is_symlink() and os.readlink(link) == destination):
            link.parent.mkdir(parents=True, exist_ok=True)
            temp = link.with_name(f".{link.name}.pyc")  # an ignored name, should it be left behind
            temp.unlink(missing_ok=True)
            temp.symlink_to(destination)
            os.replace(temp, link)
    lines = [*EXCLUDES, *("/" + re.sub(r"([\\*?\[ ])", r"\\\1", path) for path in sorted(new))]
    (tree / ".git" / "info" / "exclude").write_text("\n".join(lines) + "\n", encoding="utf-8")


def back_up(up: Upstream, view: View) -> str:
    """Commit HEAD plus every edit and stray file under refs/patchset/backup/<time>; returns the ref."""
    index = up.git_dir / "patchset.backup.index"
    repo = git.Git(up.git_dir, up.checkout, index)
    repo("read-tree", "HEAD")
    if nested := [path for path in view.edited if path.endswith("/")]:
        raise Refused(f"vendor/{up.name}/{min(nested)} is a git repository of its own; move it away first")
    paths = b"".join(os.fsencode(path) + b"\0" for path in view.edited)
    repo("update-index", "--add", "--remove", "--replace", "-z", "--stdin", stdin=paths)
    saved = repo.line("commit-tree", repo.line("write-tree"), "-p", "HEAD", "-m", "work dropped by apply --discard")
    ref = f"refs/patchset/backup/{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"
    repo("update-ref", ref, saved)
    index.unlink()
    os.sync()  # git writes without it (vendor/ can be made anew), but this is somebody's work
    reached("backed-up")
    return ref


def make_git(up: Upstream) -> Path:
    """A tree under construction: its .git is new, or the old checkout's with all a developer committed."""
    new = up.work("new")
    if up.checkout.exists():
        shutil.copytree(up.git_dir, new / ".git", ignore=shutil.ignore_patterns("*.lock"))
    else:
        git.init(new)
    reached("git-made")
    return new


def move_refs(tree: Path, built: Built) -> None:
    """Point HEAD's branch and the tool's refs at the built commits."""
    repo = git.Git(tree / ".git", tree)
    repo("update-ref", "refs/patchset/pristine", built.pristine)
    repo("update-ref", "refs/patchset/patched", built.patched)
    repo("update-ref", "HEAD", built.patched)
    reached("refs-moved")


def fill(up: Upstream, new: Path, built: Built, record: state.Record) -> None:
    """Write files, links and record of the tree under construction."""
    move_refs(new, built)
    reached("git-staged")
    index = new / ".git" / "index"
    index.unlink(missing_ok=True)  # the old one may hold flags (skip-worktree) of the developer
    git.Git(new / ".git", new, index)("read-tree", "--reset", "-u", built.patched)
    reached("tree-staged")
    sync_links(up, new, {}, record.inputs.overlay)
    reached("links-staged")
    state.save(new / ".git", record)
    shutil.copyfile(index, new / ".git" / "patchset.index")
    reached("state-staged")


def swap(up: Upstream) -> None:
    """Put the finished tree in place of the old one."""
    old, new, trash = up.work("old"), up.work("new"), up.work("trash")
    if up.checkout.exists():
        up.checkout.rename(old)
        reached("old-moved-away")
    new.rename(up.checkout)
    reached("new-moved-in")
    if old.exists():
        old.rename(trash)
        reached("old-set-aside")
        shutil.rmtree(trash)
        reached("old-removed")
