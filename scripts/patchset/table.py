# SPDX-License-Identifier: Apache-2.0
"""table: the whole difference to the upstreams as Markdown, and the README blocks that hold a copy of it."""

from __future__ import annotations

import ast
from pathlib import Path

from patchset import pins, series, state
from patchset.common import Drift, Refused
from patchset.pins import Upstream

BEGIN, END = "<!-- begin: python -m patchset table -->", "<!-- end: python -m patchset table -->"
PAGES = ("README.md", "patches/README.md")


def render(ups: list[Upstream]) -> str:
    """Per upstream: one row for each file of each patch, then the new files with the first line of their docstring."""
    blocks = []
    for up in ups:
        patches, fresh = series.load(up), state.overlay_files(up)
        rows = [(p.name, p.subject, file) for p in patches for file in p.files()]
        added, removed = sum(file.added for *_, file in rows), sum(file.removed for *_, file in rows)
        lines = [
            f"**{up.name} {up.version}**: {len(patches)} patches, +{added} −{removed} lines; {len(fresh)} new files",
            "",
        ]
        if rows or fresh:
            lines += ["| file | + | − | patch | why |", "|---|---|---|---|---|"]
        for name, why, file in rows:
            link = f"[{name.removesuffix('.patch')}](/patches/{up.name}/{name})"
            lines.append(f"| `{file.path}` | {file.added} | {file.removed} | {link} | {_cell(why)} |")
        lines += [
            f"| `{path}` | new | | [overlay](/overlay/{up.name}/{path}) | {_cell(_why(up.overlay / path))} |"
            for path in fresh
        ]
        blocks.append("\n".join(lines).rstrip() + "\n")
    return "\n".join(blocks)


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


def refresh(root: Path, *, check: bool = False) -> list[str]:
    """Rewrite the marked block of each page that has one (`check`: raise Drift instead); returns what changed."""
    changed, text = [], ""
    for name in PAGES:
        page = (root / name).read_text(encoding="utf-8") if (root / name).is_file() else ""
        before, begin, rest = page.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not end:
            continue
        text = text or render(pins.load(root))
        if (whole := f"{before}{begin}\n{text}{end}{after}") != page:
            changed.append(name)
            if not check:
                (root / name).write_text(whole, encoding="utf-8")
    if check and changed:
        raise Drift(f"{', '.join(changed)}: the table of patches is out of date; run export (make export-patches)")
    return changed
