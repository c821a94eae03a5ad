# SPDX-License-Identifier: Apache-2.0
"""Every link of a page to a file or heading of the repository leads somewhere, reports and benchmarks' pages included.

`make docs` checks the pages of the site alone.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from docs.pages import PAGES, ROOT, page

LINKED = [
    *PAGES,
    "CHANGELOG.md",
    "patches/README.md",
    *sorted(
        path.relative_to(ROOT).as_posix()
        for place, names in (("docs/results", "**/*.md"), ("benchmarks/results", "*.md"))
        for path in (ROOT / place).glob(names)
    ),
]


def prose(name: str) -> str:
    return re.sub(r"```.*?```", "", page(name), flags=re.DOTALL)


def anchors(name: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(name), re.MULTILINE)
    texts = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts}


@pytest.mark.parametrize("name", LINKED)
def test_its_links_lead_somewhere(name: str):
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(name)):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        place = Path(name) if not path else Path(path[1:]) if path[0] == "/" else Path(name).parent / path
        found = (ROOT / place).resolve()
        no_page = not found.is_file() or found.suffix != ".md"
        heading = not anchor or no_page or anchor in anchors(found.relative_to(ROOT).as_posix())
        if not found.exists() or not heading:
            dead.append(link)
    assert not dead
