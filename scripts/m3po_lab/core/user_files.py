# SPDX-License-Identifier: Apache-2.0
"""Text files that a user gives: UTF-8 with or without a byte order mark, lines that end at a line feed alone.

`str.splitlines` also cuts at U+2028 and others, which JSON leaves unescaped within a text. Nothing large is imported.
"""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from m3po_lab.core.errors import UserError

MARKS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
SHOWN = 60  # characters of a line that an error shows


def read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file, numbered from 1, without their ends.

    Raises:
        UserError: it cannot be read, or is not UTF-8; the line is named.
    """
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                yield number, line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        known = next((name for mark, name in MARKS.items() if number == 1 and line.startswith(mark)), "not UTF-8")
        raise UserError(
            f"{file}, line {number}: {known} (byte 0x{line[error.start]:02x}); save the file as UTF-8, e.g. with "
            f"'iconv -f {'utf-16' if known == 'UTF-16' else 'latin1'} -t utf-8'."
        ) from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}.") from error


def read_text(file: Path) -> str:
    """The text of a file; the errors of `read_lines`."""
    return "\n".join(line for _, line in read_lines(file))


def read_json_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file with one JSON object a line, with the numbers of their lines; empty lines are left out.

    Raises:
        UserError: as `read_lines`, or a line is no JSON object; it is named.
    """
    for number, line in read_lines(file):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{file}, line {number}: no JSON ({str(error).split(':')[0]}); each line must be one JSON object."
            ) from error
        if not isinstance(row, dict):
            raise UserError(f"{file}, line {number}: {line.strip()[:SHOWN]} is no JSON object.")
        yield number, row


def text_field(file: Path, number: int, row: dict[str, Any], name: str) -> str:
    """A text in a row of such a file.

    Raises:
        UserError: there is none of that name.
    """
    value = row.get(name)
    if not isinstance(value, str):
        raise UserError(
            f"{file}, line {number}: it has no text {name!r}; its keys are {', '.join(sorted(row)) or '-'}."
        )
    return value
