# SPDX-License-Identifier: Apache-2.0
"""upgrade: moves one pin to another release by a three-way rebase in vendor/<upstream>'s own git, then exports.

On a conflict it stops inside the rebase, where plain git goes on. Pin and record are those of the new release by then,
so that `export` works as soon as the rebase is done.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from patchset import apply, build, checkout, export, git, state, wheels
from patchset.common import Drift, Refused, progress
from patchset.pins import Upstream

STEPS = """{name}: {patch} does not fit {version}; vendor/{name} is in the middle of the rebase. Next:
  1. cd vendor/{name} && git status                  # the files in conflict
  2. edit them, git add them, then git rebase --continue; git rebase --skip drops the patch.
     Until git says that the rebase is done.
  3. cd ../.. && make export-patches                 # writes patches/{name}
  4. make check-patches && make env && make test
To give up: git -C vendor/{name} rebase --abort; git checkout -- overlay.toml;
            bash scripts/overlay_tool.sh patchset apply --upstream {name} --discard"""


def upgrade(up: Upstream, version: str) -> list[str]:
    """Pin `version`, carry the series over and export it; Drift with the next steps when a patch conflicts."""
    plan = apply.make_plan(up)
    record = plan.view.record
    if record is None or not record.applied or plan.dirty or plan.reasons or plan.view.busy:
        raise Refused(f"{up.name}: vendor/{up.name} is not what patches/ says; run make apply-patches first")
    if version == up.version:
        raise Refused(f"{up.name}: {version} is the pinned release")
    _require_committed(up)
    with tempfile.TemporaryDirectory(dir=up.wheel_file.parent, prefix="tmp-") as temp:
        target = wheels.release(up, version, Path(temp))
        commit, tree = _import(up, target, record)
        destination = up.wheel_file.with_name(target.wheel)
        if target.wheel_file != destination:
            os.replace(target.wheel_file, destination)
    inputs = state.Inputs(state.pin(target), record.inputs.patches, record.inputs.overlay)
    state.save(up.git_dir, state.Record(inputs, commit, commit, tree, applied=True))
    _pin(up, target)
    repo = git.Git(up.git_dir, up.checkout)
    repo("update-ref", "refs/patchset/pristine", commit)
    progress(f"{up.name}: rebasing {len(record.inputs.patches)} patches from {up.version} to {version}")
    try:
        repo("rebase", "--quiet", "--empty=drop", "--onto", commit, record.pristine)
    except git.GitError:
        stopped = repo("log", "-1", "--format=%s", "REBASE_HEAD", ok=(0, 128)).decode().strip()
        raise Drift(STEPS.format(name=up.name, version=version, patch=f"the patch {stopped!r}")) from None
    moved = Upstream(**(vars(target) | {"wheel_file": destination}))
    return [f"{up.name}: {up.version} -> {version}", *export.export([moved]), "Next: make check-patches, env, test"]


def _require_committed(up: Upstream) -> None:
    """Refused while the pin is not committed: an upgrade is given up by checking out the pin that git knows."""
    if not (up.root / ".git").exists():
        return
    if git.Git(up.root / ".git", up.root)("status", "--porcelain", "--", "overlay.toml", f"patches/{up.name}"):
        raise Refused(
            f"{up.name}: overlay.toml or patches/{up.name} is not committed; commit first, so that there is a way back"
        )


def _import(up: Upstream, target: Upstream, record: state.Record) -> tuple[str, str]:
    """Commit the new release in vendor's own git; returns commit and tree. Refused where it has a path of ours."""
    repo = git.Git(up.git_dir, up.checkout)
    commit = build.import_wheel(repo, target, "refs/patchset/upgrade")
    checkout.require_free(repo, target, commit, list(record.inputs.overlay))
    return commit, repo.line("rev-parse", f"{commit}^{{tree}}")


def _pin(up: Upstream, target: Upstream) -> None:
    """Write version, wheel and sha256 of `target` into the upstream's block of overlay.toml; all else stays."""
    file = up.root / "overlay.toml"
    text = file.read_text(encoding="utf-8")
    head, block, rest = re.split(rf"(?ms)^(\[upstream\.{up.name}\]\n.*?)(?=^\[|\Z)", text, maxsplit=1)
    for key in ("version", "wheel", "sha256"):
        block = re.sub(rf'(?m)^{key} = ".*"$', f'{key} = "{getattr(target, key)}"', block)
    temp = file.with_name(".overlay.toml.new")
    temp.write_text(head + block + rest, encoding="utf-8")
    os.replace(temp, file)
