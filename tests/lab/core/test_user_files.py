# SPDX-License-Identifier: Apache-2.0
"""Files that a user gives: a byte order mark is no character of theirs, what is wrong in them has a line number."""

import json
from pathlib import Path
from typing import Any

import pytest

from m3po_lab.core.config_files import find_config
from m3po_lab.core.errors import UserError
from m3po_lab.core.user_files import read_json_lines, read_lines, read_text
from m3po_lab.evaluation.agreement import agreement
from m3po_lab.evaluation.folder import FinishedParts
from m3po_lab.pretraining import data as pretrain_data
from m3po_lab.pretraining import tasks
from m3po_lab.problems import data_sources

SEPARATORS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"


def test_lines_end_at_a_line_feed_alone(tmp_path: Path) -> None:
    """JSON leaves U+2028 as it is within a text; str.splitlines cuts there."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"text": SEPARATORS}, ensure_ascii=False) + "\r\n\n" + '{"text": "2"}', encoding="utf-8")
    assert list(read_json_lines(file)) == [(1, {"text": SEPARATORS}), (3, {"text": "2"})]
    assert list(pretrain_data.documents(str(file), None)) == [SEPARATORS, "2"]


@pytest.mark.parametrize("ends", ["", "\n"])
def test_unfinished_evaluation_with_a_line_separator_in_a_completion_goes_on(ends: str, tmp_path: Path) -> None:
    batches = FinishedParts(tmp_path / "partial.jsonl", "about")
    assert batches.read(["q"], [[0]]) == []
    batches.add([SEPARATORS])
    batches.file.write_text(batches.file.read_text(encoding="utf-8").rstrip("\n") + ends, encoding="utf-8")
    assert batches.read(["q"], [[0]]) == [[SEPARATORS]]


def test_report_with_a_line_separator_in_a_completion_is_compared(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "summary.json").write_text('{"config": {}}', encoding="utf-8")
    rows = [{"question": name, "after": SEPARATORS, "correct": True} for name in "ab"]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "completions.jsonl").write_text(lines, encoding="utf-8")
    samples = [{"doc": {"question": row["question"]}, "strict_match": 1.0, "resps": [[SEPARATORS]]} for row in rows]
    found = agreement(str(tmp_path / "final"), None, samples)
    assert found is not None
    assert (found["same_verdict"], found["same_completion"]) == (2, 2)


def test_byte_order_mark_is_taken_off(tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text('{"question": "1 + 1?", "answer": "#### 2"}\n', encoding="utf-8-sig")
    assert [problem.answer for problem in data_sources.read_jsonl(file)] == ["2"]
    assert read_text(file).startswith("{")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("ok\ncaf\xe9".encode("latin1"), "line 2: not UTF-8 .byte 0xe9.; save the file as UTF-8, .*iconv -f latin1"),
        ('{"a": 1}'.encode("utf-16"), "line 1: UTF-16 .*iconv -f utf-16"),
    ],
)
@pytest.mark.parametrize("read", [lambda file: list(read_lines(file)), lambda file: find_config(str(file))])
def test_other_encoding_is_one_line_for_every_kind_of_file(
    content: bytes, text: str, read: Any, tmp_path: Path
) -> None:
    (tmp_path / "file.yaml").write_bytes(content)
    with pytest.raises(UserError, match=f"file.yaml, {text}") as raised:
        read(tmp_path / "file.yaml")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('{"a": 1', "line 2: no JSON .Expecting"),
        ("[1]", "line 2: .1. is no JSON object"),
        ("[" * 9999, "line 2: no JSON"),
    ],
)
def test_broken_json_is_one_line_for_every_command(line: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text('{"question": "x", "answer": "#### 1", "text": "x", "page": "x"}\n' + line, encoding="utf-8")
    readers = [
        lambda: data_sources.read_jsonl(file),
        lambda: list(pretrain_data.documents(str(file), None)),
        lambda: tasks.check_rows(file, tasks.COLUMNS["text.jsonl"]),
    ]
    for read in readers:
        with pytest.raises(UserError, match=f"text.jsonl, {text}") as raised:
            read()
        assert "\n" not in str(raised.value)


def test_row_without_its_text_is_named(tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "x", "page": "x"}\n{"txt": "y"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="line 2: it has no text 'text'; its keys are txt"):
        list(pretrain_data.documents(str(file), None))
    with pytest.raises(UserError, match="line 2: it lacks 'page'"):
        tasks.check_rows(file, ["page"])


def test_file_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        list(read_lines(tmp_path))
