# SPDX-License-Identifier: Apache-2.0
"""table: the whole difference to the upstreams as Markdown, and the pages that hold it, whole or summed up."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

from patchset import pins, series, state
from patchset.common import Drift, Refused
from patchset.pins import Upstream


def summary(ups: list[Upstream]) -> str:
    """One line for each upstream: its patches, their lines and the new files."""
    lines = [
        f"- [**{up.name} {up.version}**](patches/README.md#{up.name}): "
        f"{_counts(series.load(up), len(state.overlay_files(up)))}"
        for up in ups
    ]
    return "\n".join(lines) + "\n"


def render(ups: list[Upstream]) -> str:
    """Per upstream: one row for each file of each patch, then the new files with the first line of their docstring."""
    blocks = []
    for up in ups:
        patches, fresh = series.load(up), state.overlay_files(up)
        lines = [f"### {up.name}", "", f"{up.version}: {_counts(patches, len(fresh))}", ""]
        if patches or fresh:
            lines += ["| file | + | − | patch | why |", "|---|---|---|---|---|"]
        for patch in patches:
            link = f"[{patch.name.removesuffix('.patch')}](/patches/{up.name}/{patch.name})"
            for file in patch.files():
                lines.append(f"| `{file.path}` | {file.added} | {file.removed} | {link} | {_cell(patch.subject)} |")
        lines += [
            f"| `{path}` | new | | [overlay](/overlay/{up.name}/{path}) | {_cell(_why(up.overlay / path))} |"
            for path in fresh
        ]
        blocks.append("\n".join(lines).rstrip() + "\n")
    return "\n".join(blocks)


def _counts(patches: list[series.Patch], new_files: int) -> str:
    files = [file for patch in patches for file in patch.files()]
    added, removed = sum(file.added for file in files), sum(file.removed for file in files)
    new = _number(new_files, "new file", "new files")
    return f"{_number(len(patches), 'patch', 'patches')}, +{added} −{removed} lines; {new}"


def _number(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _why(file: Path) -> str:
    """The first line of a module's docstring ('' where there is none)."""
    if file.suffix != ".py":
        return ""
    try:
        text = ast.get_docstring(ast.parse(file.read_bytes())) or ""
    except (SyntaxError, ValueError) as error:
        raise Refused(f"{file} is no valid Python: {error}") from None
    return text.split("\n", 1)[0]


# The page that holds each generated block, and the name of the block in its marks.
BLOCKS: dict[str, tuple[str, Callable[[list[Upstream]], str]]] = {
    "README.md": ("summary", summary),
    "patches/README.md": ("table", render),
}


def marks(page: str) -> tuple[str, str]:
    """The two lines between which `export` writes the block of a page."""
    name, _ = BLOCKS[page]
    return f"<!-- begin: patchset {name}, written by make export-patches -->", f"<!-- end: patchset {name} -->"


def refresh(root: Path, *, check: bool = False) -> list[str]:
    """Rewrite the marked block of each page that has one (`check`: raise Drift instead); returns what changed."""
    changed = []
    for name, (_, write) in BLOCKS.items():
        text = (root / name).read_text(encoding="utf-8") if (root / name).is_file() else ""
        begin, end = marks(name)
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            continue
        if (whole := f"{before}{begin}\n{write(pins.load(root))}{end}{after}") != text:
            changed.append(name)
            if not check:
                (root / name).write_text(whole, encoding="utf-8")
    if check and changed:
        raise Drift(f"{', '.join(changed)}: the list of patches is out of date; run export (make export-patches)")
    return changed
