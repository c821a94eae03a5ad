# SPDX-License-Identifier: Apache-2.0
"""The hook of mkdocs.yml: the site holds the pages of docs/, and what they link to elsewhere in the repository.

Pages link to files as a reader of the repository needs it: relative to the page, or from the root with a slash. In the
site the Markdown files beside docs/ are pages too, so that mkdocs checks their links and anchors as well; every other
file that a page links to is copied as plain text, and a folder as the list of its files. A link to what does not exist
is left as it is, for mkdocs to report.
"""

import posixpath
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from markdown import Markdown
from markdown.extensions import Extension
from markdown.treeprocessors import Treeprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[3]
DOCS = "docs/"
ELSEWHERE = "repository/"  # where in the site the files outside docs/ are
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "patches/README.md", "scripts/README.md")
RESULTS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("benchmarks/results/*.md"))


def place_in_site(path: str) -> str:
    """Where the site has a file or folder of the repository: what is no page and no file of docs/ is a text."""
    if path.startswith(DOCS) and (ROOT / path).is_file():
        return path.removeprefix(DOCS)
    return ELSEWHERE + (path if path in (*PAGES, *RESULTS) else f"{path}.txt")


class Links(Treeprocessor):
    """Points the links of one page at their places in the site."""

    def __init__(self, page: Page, config: MkDocsConfig, files: Files):
        self._source, self._config, self._files = page.file.src_uri, config, files
        in_docs = not self._source.startswith(ELSEWHERE)
        self._path = DOCS + self._source if in_docs else self._source.removeprefix(ELSEWHERE)

    def run(self, root: Element) -> None:
        for element in root.iter():
            for attribute in ("href", "src"):
                if attribute in element.attrib:
                    element.set(attribute, self._place(element.attrib[attribute]))

    def _place(self, link: str) -> str:
        target, mark, anchor = link.partition("#")
        if not target or ":" in target:
            return link
        path = posixpath.normpath(posixpath.join(posixpath.dirname("/" + self._path), target)).removeprefix("/")
        if not (ROOT / path).exists():
            return link
        place = place_in_site(path)
        if self._files.get_file_from_path(place) is None:
            self._files.append(self._copy(path, place))
        return posixpath.relpath(place, posixpath.dirname(self._source) or ".") + mark + anchor

    def _copy(self, path: str, place: str) -> File:
        if (ROOT / path).is_dir():
            names = sorted(file.name for file in (ROOT / path).iterdir() if not file.name.startswith("__"))
            return File.generated(self._config, place, content="\n".join(names) + "\n")
        return File.generated(self._config, place, abs_src_path=str(ROOT / path))


class LinkExtension(Extension):
    """Hands `Links` of the page that is rendered to Markdown, before mkdocs looks at the links."""

    links: Links

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802, the name that Markdown calls
        md.treeprocessors.register(self.links, "m3po_links", 5)


LINKS = LinkExtension()


def on_config(config: MkDocsConfig) -> None:
    """Event of mkdocs: the extension joins those of mkdocs.yml."""
    extensions: list[Any] = config.markdown_extensions
    extensions.append(LINKS)


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Event of mkdocs: the Markdown files beside docs/ become pages."""
    for path in (*PAGES, *RESULTS):
        page = File.generated(config, place_in_site(path), abs_src_path=str(ROOT / path))
        if path in RESULTS:
            page.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(page)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> None:
    """Event of mkdocs, before a page is rendered."""
    LINKS.links = Links(page, config, files)
