# SPDX-License-Identifier: Apache-2.0
"""check --against and compatibility: does the series apply to another release? Works in a temporary folder only.

Both releases are commits of one scratch repository, so that a patch that does not fit as it is can be merged three-way.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from patchset import build, check, checkout, git, series, state, wheels
from patchset.common import Drift, Refused, progress
from patchset.pins import Upstream

PAGE = "docs/compatibility.md"
RELEASES = 6
HEAD = (
    "# Compatibility\n\n"
    "Written by `make compatibility`: the series against the newest {count} releases of each upstream, tried on the "
    "wheels of the package index. The pinned release is the one that is tested; the others say how far an upgrade "
    "is.\n\n"
    "- **clean**: applies as it is. **moved**: applies at other lines, or by a three-way merge. "
    "**conflict**: somebody has to look. **upstream**: the release has the change already.\n"
    "- **imports**: what happens when the patched packages are imported in this project's environment, whose versions "
    "fit the pinned release; a requirement that it lacks is named. The new files under `overlay/` are part of it.\n"
)


@dataclass(frozen=True)
class Verdict:
    """How one patch, or one new file, fares on another release: clean, moved, conflict or upstream."""

    name: str
    word: str
    detail: str = ""


@dataclass(frozen=True)
class Outcome:
    """A series on another release; `imports` is what was said when it was imported."""

    version: str
    verdicts: list[Verdict]
    imports: str

    @property
    def applies(self) -> bool:
        return all(verdict.word != "conflict" for verdict in self.verdicts)

    def counts(self) -> str:
        """E.g. "2 clean, 1 moved"."""
        numbers = Counter(verdict.word for verdict in self.verdicts)
        return ", ".join(f"{number} {word}" for word, number in numbers.items()) or "nothing to apply"


def against(up: Upstream, version: str) -> list[str]:
    """The report on one release; Drift when a patch or a new file conflicts."""
    with tempfile.TemporaryDirectory(prefix="patchset-") as temp:
        outcome = judge(up, wheels.release(up, version, Path(temp, "wheels")), Path(temp))
    lines = [f"{up.name} {up.version} against {version}: {outcome.counts()}"]
    lines += [f"  {one.word:9} {one.name}{f' ({one.detail})' if one.detail else ''}" for one in outcome.verdicts]
    lines.append(f"  imports   {outcome.imports}")
    if not outcome.applies:
        raise Drift("\n".join(lines))
    return lines


def judge(up: Upstream, target: Upstream, temp: Path) -> Outcome:
    """Lay the series on the release `target`, patch by patch; one that conflicts is left out and the next is tried."""
    wheels.ensure(up)
    patches, fresh = series.load(up), state.overlay_files(up)
    repo = build.scratch(temp / "git")
    build.build(repo, up, patches)  # the blobs that a three-way merge starts from
    commit = build.import_wheel(repo, target, "refs/patchset/target")
    repo("read-tree", commit)
    verdicts = [_lay_on(repo, patch) for patch in patches]
    tree = repo.line("write-tree")
    try:
        checkout.require_free(repo, up, commit, fresh)
    except Refused:
        verdicts += [Verdict(path, "conflict", "the release has that path") for path in fresh if _has(repo, tree, path)]
    applies = all(verdict.word != "conflict" for verdict in verdicts)
    touched = [file.path for patch in patches for file in patch.files() if not file.deleted]
    imports = "not tried: not all of it is laid on"
    if not up.imports:
        imports = "not tried: overlay.toml names no package to import"
    elif applies:
        folder = check.write_tree(up, repo, tree, fresh, temp / "tree")
        imports = _imports(up, folder, [*up.imports, *check.module_names(up, [*touched, *fresh])], temp)
    return Outcome(target.version, verdicts, imports)


def _imports(up: Upstream, folder: Path, modules: list[str], temp: Path) -> str:
    try:
        return check.import_modules(up.root, [folder], modules, str(temp)).removeprefix("imports: ")
    except Drift as error:
        return str(error).removeprefix("imports: ")


def _has(repo: git.Git, tree: str, path: str) -> bool:
    return bool(repo("ls-tree", tree, "--", path))


def _lay_on(repo: git.Git, patch: series.Patch) -> Verdict:
    """Apply one patch to the index, if it can be; the index is as before when it cannot."""
    before = repo.line("write-tree")
    if _applies(repo, patch, "--reverse", "--check") is not None:
        return Verdict(patch.name, "upstream")
    output = _applies(repo, patch, "--verbose")
    if output is not None:
        offsets = sorted(map(int, re.findall(r"\(offset (-?\d+) lines?\)", output)))
        if not offsets:
            return Verdict(patch.name, "clean")
        return Verdict(patch.name, "moved", f"by {' to '.join(map(str, sorted({offsets[0], offsets[-1]})))} lines")
    if _applies(repo, patch, "--3way") is not None:
        return Verdict(patch.name, "moved", "three-way merge")
    unmerged = {line.split("\t")[1] for line in repo.line("ls-files", "-u").splitlines()}
    missing = {file.path for file in patch.files() if not _has(repo, before, file.path)}
    repo("read-tree", "--reset", before)
    detail = [*(f"{path} is gone" for path in sorted(missing)), *sorted(unmerged)]
    return Verdict(patch.name, "conflict", "; ".join(detail))


def _applies(repo: git.Git, patch: series.Patch, *options: str) -> str | None:
    """What git says while it applies a patch to the index; None when it cannot."""
    try:
        return repo.talk("apply", "--cached", "--whitespace=nowarn", *options, "-", stdin=patch.diff)
    except git.GitError:
        return None


def compatibility(root: Path, ups: list[Upstream]) -> list[str]:
    """Write docs/compatibility.md; returns one line per release that was tried."""
    lines, blocks = [], [HEAD.format(count=RELEASES)]
    for up in ups:
        rows = [f"## {up.name}\n", "| release | patches | what | imports |", "|---|---|---|---|"]
        for version in wheels.newest(up, RELEASES):
            with tempfile.TemporaryDirectory(prefix="patchset-") as temp:
                outcome = judge(up, wheels.release(up, version, Path(temp, "wheels")), Path(temp))
            lines.append(f"{up.name} {version}: {outcome.counts()}; imports {outcome.imports}")
            progress(lines[-1])
            what = "<br>".join(
                f"{one.word}: `{one.name}`{f', {one.detail}' if one.detail else ''}"
                for one in outcome.verdicts
                if one.word != "clean"
            )
            pinned = " (pinned)" if version == up.version else ""
            rows.append(f"| {version}{pinned} | {outcome.counts()} | {what} | {outcome.imports} |")
        blocks.append("\n".join(rows) + "\n")
    page = root / PAGE
    page.parent.mkdir(exist_ok=True)
    page.write_text("\n".join(blocks), encoding="utf-8")
    return lines
