# SPDX-License-Identifier: Apache-2.0
"""status: per upstream one word (missing, pristine, patched, edited, stale) and what stands behind it."""

from __future__ import annotations

from dataclasses import dataclass

from patchset import checkout, state, wheels
from patchset.common import Refused
from patchset.pins import Upstream


@dataclass
class Status:
    """One upstream: `state` is the worst that holds; `edited` and `stale` may both be filled."""

    version: str
    state: str
    patches: int
    new_files: int
    edited: dict[str, str]  # path -> M, D, T, A (committed) or ? (stray)
    stale: list[str]  # one line per changed input
    wrong: str | None  # why the state cannot be told: a wheel with another hash, a broken series, a foreign folder

    @property
    def ok(self) -> bool:
        """Whether the checkout is what pins, patches/ and overlay/ say."""
        return self.state == "patched" or (self.state == "pristine" and not self.patches and not self.new_files)


def look(up: Upstream) -> Status:
    """The status of one upstream; never raises for what the project holds, so that every upstream gets its line."""
    found = Status(up.version, "missing", 0, 0, {}, [], None)
    try:
        wheels.verify(up)
        inputs, view = state.current(up), checkout.inspect(up)
    except Refused as error:
        found.state, found.wrong = "refused", str(error)
        return found
    found.patches, found.new_files = len(inputs.patches), len(inputs.overlay)
    if view.record is not None:
        found.edited = view.edited
        found.stale = state.reasons(view.record.inputs, inputs, up.name)
        edited = view.edited or view.committed or view.busy
        found.state = "edited" if edited else "stale" if found.stale else "patched"
        if not view.record.applied and not edited:
            found.state = "pristine"
            found.stale = []
    return found


def lines(name: str, found: Status) -> list[str]:
    """The report of one upstream for people."""
    text = f"{name} {found.version}: {found.state} ({found.patches} patches, {found.new_files} new files)"
    if found.wrong:
        return [f"{name} {found.version}: {found.state}", f"  {found.wrong}"]
    edits = [f"  {mark} {path}" for path, mark in sorted(found.edited.items())]
    return [text, *edits, *(f"  stale: {reason}" for reason in found.stale)]
