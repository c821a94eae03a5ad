# SPDX-License-Identifier: Apache-2.0
"""What a checkout was made from (vendor/<upstream>/.git/patchset.json), and how that differs from the project now."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from patchset import series
from patchset.common import Refused, path_fault
from patchset.pins import Upstream
from patchset.wheels import digest


@dataclass
class Inputs:
    """Everything a checkout is a function of."""

    pin: dict[str, str]
    patches: list[list[str]] = field(default_factory=list)  # [name, sha256] in order
    overlay: dict[str, str] = field(default_factory=dict)  # checkout path -> sha256


@dataclass
class Record:
    """The inputs and commits of the checkout as it was last written; `applied` is False after a bare fetch."""

    inputs: Inputs
    pristine: str
    patched: str
    tree: str
    applied: bool


def overlay_files(up: Upstream) -> list[str]:
    """Checkout paths of the new files, sorted; links and unsafe names are refused."""
    files = []
    for folder, below, names in os.walk(up.overlay):
        below[:] = [name for name in below if name != "__pycache__" and not name.startswith(".")]
        for path in (Path(folder, name) for name in names if not name.endswith(".pyc")):
            relative = path.relative_to(up.overlay).as_posix()
            if path.is_symlink() or not path.is_file() or path_fault(relative):
                raise Refused(f"overlay/{up.name}/{relative}: {path_fault(relative) or 'not a plain file'}")
            files.append(relative)
    return sorted(files)


def pin(up: Upstream) -> dict[str, str]:
    """The part of the pin that decides what the checkout holds."""
    return {"version": up.version, "sha256": up.sha256, "prefix": up.prefix}


def current(up: Upstream) -> Inputs:
    """The inputs as they lie in the project now."""
    overlay = {path: digest(up.overlay / path) for path in overlay_files(up)}
    return Inputs(pin(up), series.hashes(up), overlay)


def reasons(old: Inputs, new: Inputs, name: str) -> list[str]:
    """One line per input of upstream `name` that changed from `old` to `new`."""
    pins = [(key, old.pin.get(key), new.pin[key]) for key in new.pin]
    lines = [f"overlay.toml: {key} {was} -> {now}" for key, was, now in pins if was != now]
    before, after = ({file: sha for file, sha in inputs.patches} for inputs in (old, new))
    for folder, had, has in (("patches", before, after), ("overlay", old.overlay, new.overlay)):
        for path in sorted(had.keys() | has.keys()):
            if had.get(path) != has.get(path):
                what = "added" if path not in had else "removed" if path not in has else "changed"
                lines.append(f"{folder}/{name}/{path} {what}")
    if not lines and old.patches != new.patches:
        lines.append(f"patches/{name}/series: another order")
    return lines


def load(git_dir: Path) -> Record | None:
    """The checkout's record, or None when there is none that can be read."""
    try:
        data = json.loads((git_dir / "patchset.json").read_text(encoding="utf-8"))
        return Record(**(data | {"inputs": Inputs(**data["inputs"])}))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def save(git_dir: Path, record: Record) -> None:
    """Write the record in one step, and drop the private index, which `checkout.inspect` makes anew from it."""
    (git_dir / "patchset.index").unlink(missing_ok=True)
    temp = git_dir / "patchset.json.new"
    temp.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")
    os.replace(temp, git_dir / "patchset.json")
