# SPDX-License-Identifier: Apache-2.0
"""fetch and apply: first a plan that may refuse and writes nothing, then one upstream after the other."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field

from patchset import build, checkout, series, state, wheels
from patchset.common import Refused, progress, reached
from patchset.pins import Upstream

WAY_OUT = """To keep them: commit in vendor/{name}, then export (make export-patches).
To drop them: apply --discard (a ref under refs/patchset/backup keeps them)."""


@dataclass
class Plan:
    """What apply found for one upstream: its checkout, the inputs now, why they differ, the linted series if needed."""

    up: Upstream
    view: checkout.View
    inputs: state.Inputs
    reasons: list[str] = field(default_factory=list)
    patches: list[series.Patch] = field(default_factory=list)

    @property
    def dirty(self) -> bool:
        return bool(self.view.edited or self.view.committed)

    @property
    def rebuild(self) -> bool:
        """Whether the tree or its commits must be made anew (new files only need their links)."""
        was = self.view.record
        return (
            was is None or self.dirty or (was.inputs.pin, was.inputs.patches) != (self.inputs.pin, self.inputs.patches)
        )


def fetch(ups: list[Upstream]) -> list[str]:
    """Download, verify and commit the pristine trees; a checkout that exists is left as it is."""
    lines = []
    for up in ups:
        wheels.ensure(up)
        record = checkout.inspect(up).record
        if record is None:
            _write(Plan(up, checkout.View(), state.Inputs(state.pin(up))), applied=False)
            lines.append(f"{up.name} {up.version}: pristine")
        elif record.inputs.pin == state.pin(up):
            lines.append(f"{up.name} {up.version}: up to date")
        else:
            lines.append(
                f"{up.name} {up.version}: fetched; vendor/{up.name} is {record.inputs.pin['version']} until apply"
            )
    return lines


def apply(ups: list[Upstream], *, discard: bool = False) -> list[str]:
    """Bring the checkouts to pins, patches and overlay files; returns one line per upstream."""
    plans = [make_plan(up) for up in ups]
    if faults := [fault for plan in plans for fault in _faults(plan, discard)]:
        raise Refused("\n".join(faults))
    reached("planned")
    return [_carry_out(plan) for plan in plans]


def make_plan(up: Upstream) -> Plan:
    """Look at wheel, checkout and inputs; lints the series when it has to be laid on."""
    wheels.verify(up)
    plan = Plan(up, checkout.inspect(up), state.current(up))
    record = plan.view.record
    if record is not None:
        plan.reasons = state.reasons(record.inputs, plan.inputs, up.name)
    if plan.rebuild:
        plan.patches = series.load(up)
    return plan


def _faults(plan: Plan, discard: bool) -> list[str]:
    where = f"vendor/{plan.up.name}"
    if plan.view.busy:
        return [f"{plan.up.name}: {where} is in the middle of a git command ({plan.view.busy}); finish or abort it"]
    if not plan.dirty or discard:
        return []
    files = [f"  {mark} {path}" for path, mark in sorted(plan.view.edited.items())]
    head = f"{plan.up.name}: refused: {where} holds edits that no patch has:"
    return [head, *files, WAY_OUT.format(name=plan.up.name)]


def _carry_out(plan: Plan) -> str:
    up, record = plan.up, plan.view.record
    what = f"{len(plan.inputs.patches)} patches, {len(plan.inputs.overlay)} new files"
    if record and record.applied and not plan.dirty and not plan.reasons:
        return f"{up.name} {up.version}: up to date ({what})"
    saved = f"; backup: {checkout.back_up(up, plan.view)}" if record and plan.dirty else ""
    if record and not plan.rebuild:
        _update(plan, record)
    else:
        _write(plan, applied=True)
    return f"{up.name} {up.version}: applied ({what}){saved}"


def _update(plan: Plan, was: state.Record) -> None:
    """Only new files came, went or changed: the tree stays, its links follow."""
    up, repo = plan.up, build.scratch(plan.up.work("scratch"), plan.up.git_dir / "objects")
    checkout.require_free(repo, up, was.pristine, list(plan.inputs.overlay))
    checkout.sync_links(up, up.checkout, was.inputs.overlay, plan.inputs.overlay)
    reached("links-synced")
    state.save(up.git_dir, state.Record(plan.inputs, was.pristine, was.patched, was.tree, applied=True))
    reached("state-written")
    shutil.rmtree(up.work("scratch"))


def _write(plan: Plan, *, applied: bool) -> None:
    """Build the tree beside the checkout and swap it in; the record travels inside the new tree."""
    up, was = plan.up, plan.view.record
    known = was.pristine if was and was.inputs.pin == plan.inputs.pin else None
    if known is None:
        wheels.ensure(up)
    new = checkout.make_git(up)
    repo = build.scratch(up.work("scratch"), new / ".git" / "objects")
    try:
        built = build.build(repo, up, plan.patches, known)
        checkout.require_free(repo, up, built.pristine, list(plan.inputs.overlay))
        progress(f"{up.name} {up.version}: {len(plan.patches)} patches apply; writing vendor/{up.name}")
        record = state.Record(plan.inputs, built.pristine, built.patched, built.tree, applied)
        checkout.fill(up, new, built, record)
        checkout.swap(up)
    finally:
        shutil.rmtree(up.work("scratch"), ignore_errors=True)
        shutil.rmtree(new, ignore_errors=True)
