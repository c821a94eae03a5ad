# SPDX-License-Identifier: Apache-2.0
"""The tree as a reader meets it: nothing cites a document that is not here, no file or folder is too long."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ("docs/results/", "benchmarks/results/", "tests/fixtures/")  # what runs and models wrote
TAGS = re.compile(
    r"\bE[0-9]{1,2}\b|\b[Ee]rrat(?:um|a)\b"
    r"|\b[Ss]eeds? [1-5](?:'s\b|,? (?:and [1-5]|sections?|tasks?|phases?|names|uses|has|asks|adds|documents?)\b)"
    r"|\b[Dd]esign,? section\b|\bthe design(?:'s)? (?:says|table|flag table)\b"
)
LONGEST_MODULE, LONGEST_TEST, LARGEST_FOLDER = 400, 500, 14


def tracked(*patterns: str) -> list[Path]:
    names = subprocess.check_output(["git", "-C", str(ROOT), "ls-files", "-z", *patterns], text=True).split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def test_no_line_cites_a_document_that_a_reader_does_not_have() -> None:
    cited = []
    for path in tracked():
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(RECORDED) or name == "CHANGELOG.md" or path == Path(__file__):
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:  # a picture
            continue
        cited += [f"{name}:{number}: {line.strip()}" for number, line in enumerate(lines, 1) if TAGS.search(line)]
    assert cited == []


def test_the_tags_are_seen() -> None:
    seen = ["the record (E5).", "erratum E9", "seed 2's table", "seed 3, section 1", "the names of seeds 3 and 4"]
    assert all(TAGS.search(line) for line in seen)
    assert not any(TAGS.search(line) for line in ["--seed 1", "of seed 1 the gain is", "1E5", "in E major", "Eq. 5"])


def test_no_module_and_no_test_is_too_long() -> None:
    lengths = {path: len(path.read_bytes().splitlines()) for path in tracked("*.py")}
    limits = {path: LONGEST_TEST if "tests" in path.relative_to(ROOT).parts[:1] else LONGEST_MODULE for path in lengths}
    assert {path.name: length for path, length in lengths.items() if length > limits[path]} == {}


def test_no_folder_has_more_python_files_than_one_can_look_over() -> None:
    folders = Counter(path.parent.relative_to(ROOT).as_posix() for path in tracked("*.py"))
    large = {name for name, number in folders.items() if number > LARGEST_FOLDER}
    assert large <= {"scripts/patchset", "tests/patchset", "benchmarks"}  # the last: a program a file
