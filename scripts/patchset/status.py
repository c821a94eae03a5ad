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
    status = Status(up.version, "missing", 0, 0, {}, [], None)
    try:
        wheels.verify(up)
        inputs, view = state.current(up), checkout.inspect(up)
    except Refused as error:
        status.state, status.wrong = "refused", str(error)
        return status
    status.patches, status.new_files = len(inputs.patches), len(inputs.overlay)
    if view.record is not None:
        status.edited = view.edited
        status.stale = state.reasons(view.record.inputs, inputs, up.name)
        edited = view.edited or view.committed or view.busy
        status.state = "edited" if edited else "stale" if status.stale else "patched"
        if not view.record.applied and not edited:
            status.state = "pristine"
            status.stale = []
    return status


def lines(name: str, status: Status) -> list[str]:
    """The report of one upstream for people."""
    text = f"{name} {status.version}: {status.state} ({status.patches} patches, {status.new_files} new files)"
    if status.wrong:
        return [f"{name} {status.version}: {status.state}", f"  {status.wrong}"]
    edits = [f"  {mark} {path}" for path, mark in sorted(status.edited.items())]
    return [text, *edits, *(f"  stale: {reason}" for reason in status.stale)]
