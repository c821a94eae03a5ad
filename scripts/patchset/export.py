# SPDX-License-Identifier: Apache-2.0
"""export: the commits of vendor/<upstream> become patches/, byte for byte the same on every run and machine.

New files leave the patches and become files under overlay/. A commit remembers its file name in a `Patch-File:` line,
so that rewording its subject does not rename the patch; the line never reaches patches/.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from patchset import build, checkout, git, series, state, table, wheels
from patchset.common import Drift, Refused
from patchset.pins import Upstream

# Each option shuts out one source of bytes that differ between machines or git settings.
FORMAT = (
    "--stdout", "-1", "-N", "-k", "--zero-commit", "--no-signature", "--no-stat", "--full-index", "--no-renames",
    "--diff-algorithm=myers", "--indent-heuristic", "-U3", "--inter-hunk-context=0", "--src-prefix=a/",
    "--dst-prefix=b/", "--no-ext-diff", "--no-textconv", "--no-color", "--encode-email-headers",
)  # fmt: skip
MARK = re.compile(rb"^Patch-File: *(.*)\n", re.MULTILINE)
AUTHOR = b"M3PO overlay <overlay@m3po.invalid>"  # of every patch, whoever wrote it
SLUG = 40  # letters of a file name, at most


@dataclass
class Export:
    """What patches/ and overlay/ should hold: patches in order, new files, and the commits they were taken from."""

    patches: dict[str, bytes]
    new_files: dict[str, bytes]
    tree: str  # of the last commit, without new files


def series_of(repo: git.Git, up: Upstream, pristine: str, head: str) -> Export:
    """Turn the commits pristine..head into patches; Refused for merges, foreign history, links and name clashes."""
    if repo("merge-base", pristine, head, ok=(0, 1)).decode().strip() != pristine:
        raise Refused(
            f"{up.name}: HEAD of vendor/{up.name} does not descend from the pristine commit; see refs/patchset"
        )
    if repo("rev-list", "--merges", f"{pristine}..{head}"):
        raise Refused(f"{up.name}: vendor/{up.name} holds a merge commit; rebase it onto refs/patchset/pristine")
    result = Export({}, {}, repo.line("rev-parse", f"{pristine}^{{tree}}"))
    parent, fresh = pristine, b""
    for commit in repo.line("rev-list", "--reverse", f"{pristine}..{head}").split():
        repo("read-tree", commit)
        fresh = repo("diff-index", "--cached", "-z", "--name-only", "--no-renames", "--diff-filter=A", pristine)
        repo("update-index", "--force-remove", "-z", "--stdin", stdin=fresh)
        tree = repo.line("write-tree")
        if tree == result.tree:
            continue
        raw = repo("cat-file", "commit", commit)
        name = _file_name(up, raw, result.patches)
        parent, result.tree = _rewrite(repo, raw, tree, parent), tree
        result.patches[name] = repo("format-patch", *FORMAT, parent)
    for path in (os.fsdecode(name) for name in fresh.split(b"\0") if name):
        if repo("ls-tree", head, "--", path)[:3] != b"100":
            raise Refused(f"{up.name}: {path} is committed as a link; new files are edited in overlay/{up.name}")
        result.new_files[path] = repo("cat-file", "blob", f"{head}:{path}")
    return result


def _file_name(up: Upstream, raw: bytes, patches: dict[str, bytes]) -> str:
    """The commit's remembered name, else its place in the series and whole words of its subject."""
    _, _, message = raw.partition(b"\n\n")
    subject = message.split(b"\n", 1)[0].decode("utf-8", "replace")
    slug, *words = re.findall(r"[a-z0-9]+", subject.lower()) or ["patch"]
    for word in words:
        if len(f"{slug}-{word}") > SLUG:
            break
        slug = f"{slug}-{word}"
    name = f"{len(patches) + 1:04d}-{slug[:SLUG]}.patch"
    mark = MARK.search(message)
    if mark and mark[1].decode() not in patches and series.NAME.fullmatch(mark[1].decode()):
        name = mark[1].decode()
    if name in patches or not series.NAME.fullmatch(name):
        raise Refused(f"{up.name}: the commit {subject!r} needs a subject of its own: {name} is taken or no file name")
    return name


def _rewrite(repo: git.Git, raw: bytes, tree: str, parent: str) -> str:
    """The same commit (date, message) with another tree and parent, of the one author, without the Patch-File line."""
    head, _, message = raw.partition(b"\n\n")
    written = next(line for line in head.split(b"\n") if line.startswith(b"author "))
    author = b"author " + AUTHOR + b" " + b" ".join(written.rsplit(b" ", 2)[1:])
    lines = [f"tree {tree}".encode(), f"parent {parent}".encode(), author, author.replace(b"author", b"committer", 1)]
    data = b"\n".join(lines) + b"\n\n" + MARK.sub(b"", message)
    return repo("hash-object", "-t", "commit", "-w", "--stdin", stdin=data).decode().strip()


def export(ups: list[Upstream], *, check: bool = False) -> list[str]:
    """Write committed edits back to patches/ and overlay/ (or only compare); returns one line per upstream."""
    lines = []
    for up in ups:
        folder = up.work("scratch")
        try:
            repo = build.scratch(folder, up.git_dir / "objects" if up.git_dir.is_dir() else None)
            lines.append(_export(up, repo, check))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    if ups and not check:
        lines += [f"{name}: list of patches written" for name in table.refresh(ups[0].root)]
    return lines


def _export(up: Upstream, repo: git.Git, check: bool) -> str:
    view = checkout.inspect(up)
    if view.record is None:
        raise Refused(f"{up.name}: there is no vendor/{up.name}; run apply (make apply-patches) first")
    head = git.Git(up.git_dir, up.checkout).line("rev-parse", "HEAD")
    unsaved = checkout.differences(up, view.record, head)
    if view.busy or unsaved:
        files = "".join(f"\n  {mark} {path}" for path, mark in sorted(unsaved.items()))
        what = f"is in the middle of a git command ({view.busy})" if view.busy else f"holds uncommitted edits:{files}"
        stop = Drift if check else Refused
        raise stop(f"{up.name}: vendor/{up.name} {what}\nCommit them with git in vendor/{up.name}, then export again.")
    result = series_of(repo, up, view.record.pristine, head)
    changes = compare(up, result)
    lines = describe(up, changes)
    if check and changes:
        raise Drift("\n".join([f"{up.name}: vendor/{up.name} and patches/ differ:", *lines]))
    if check:
        return f"{up.name} {up.version}: patches/ equals vendor/ ({len(result.patches)} patches)"
    _require_known(up, view.record, changes)
    built = _prove(up, repo, view.record.pristine, result)
    for file, data in changes.items():
        _put(file, data)
    checkout.move_refs(up.checkout, built)
    inputs = state.current(up)
    checkout.require_free(repo, up, built.pristine, list(inputs.overlay))
    checkout.sync_links(up, up.checkout, view.record.inputs.overlay, inputs.overlay)
    git.Git(up.git_dir, up.checkout)("reset", "-q", "--mixed", "HEAD")
    state.save(up.git_dir, state.Record(inputs, built.pristine, built.patched, built.tree, applied=True))
    return "\n".join([f"{up.name} {up.version}: {len(result.patches)} patches, {len(lines) or 'no'} changes", *lines])


def compare(up: Upstream, result: Export) -> dict[Path, bytes | None]:
    """The files under patches/ and overlay/ that export would write (new files first, series last) or delete (None)."""
    series_file = up.patches / "series"
    old = series_file.read_text(encoding="utf-8").splitlines(keepends=True) if series_file.exists() else []
    comment = "".join(itertools.takewhile(lambda line: line.startswith("#"), old))
    files: dict[Path, bytes | None] = {up.overlay / path: data for path, data in result.new_files.items()}
    files |= {file: None for file in up.patches.glob("*.patch") if file.name not in result.patches}
    files |= {up.patches / name: data for name, data in result.patches.items()}
    if [line.strip() for line in old if line.strip() and not line.startswith("#")] != list(result.patches):
        files[series_file] = (comment + "".join(f"{name}\n" for name in result.patches)).encode()
    return {file: data for file, data in files.items() if (file.read_bytes() if file.is_file() else None) != data}


def describe(up: Upstream, changes: dict[Path, bytes | None]) -> list[str]:
    """One line per change."""
    words = [
        ("gone" if data is None else "changed" if file.exists() else "new", file) for file, data in changes.items()
    ]
    return [f"  {word}: {file.relative_to(up.root)}" for word, file in words]


def _require_known(up: Upstream, record: state.Record, changes: dict[Path, bytes | None]) -> None:
    """Refuse to overwrite a patch that was changed on disk since it was applied."""
    if record.inputs.pin != state.pin(up):
        raise Refused(f"{up.name}: overlay.toml pins another wheel than vendor/{up.name} holds; apply first")
    applied = {name: digest for name, digest in record.inputs.patches}
    for file in changes:
        now = wheels.digest(file) if file.is_file() else None
        if file.suffix == ".patch" and now != applied.get(file.name):
            raise Refused(
                f"{up.name}: patches/{up.name}/{file.name} changed after it was applied; export would overwrite that. "
                "Restore the file, or run apply --discard and cherry-pick your commits from the backup ref it names"
            )


def _prove(up: Upstream, repo: git.Git, pristine: str, result: Export) -> build.Built:
    """Lint the patches to be written, lay them on again: the tree, and a second export, must be the same."""
    patches = [series.parse(name, data) for name, data in result.patches.items()]
    series.lint(up, patches)
    built = build.apply_series(repo, up, pristine, patches)
    again = series_of(repo, up, pristine, built.patched)
    if built.tree != result.tree or again.patches != result.patches:
        raise Drift(f"{up.name}: the patches do not survive a round trip; is there a line like a diff's in a message?")
    return built


def _put(file: Path, data: bytes | None) -> None:
    """Write a file in one step, or delete it."""
    if data is None:
        file.unlink()
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    temp = file.with_name(f".{file.name}.pyc")  # an ignored name, should it be left behind
    temp.write_bytes(data)
    os.replace(temp, file)
