# SPDX-License-Identifier: Apache-2.0
"""Files that a process killed while writing leaves either old or new, never half; and how a folder is shown."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from m3po_lab.core.errors import UserError, failure


def write_text(file: Path, text: str) -> None:
    """Write a text file through a temporary one beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)  # there is one only where the disk was full


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file, indented, through a temporary one."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(file: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None when the file is missing or is not one whole object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def shown_path(folder: Path) -> str:
    """A folder relative to the current one where that is shorter."""
    here = Path.cwd()
    return str(folder.relative_to(here)) if folder.is_relative_to(here) else str(folder)


def check_writable(folder: Path, flag: str = "--output_dir") -> None:
    """Refuse a folder for results into which nothing can be written; it is not made yet.

    Args:
        folder: where the results will lie.
        flag: names it.

    Raises:
        UserError: says why and what to do.
    """
    try:
        place = folder.absolute()
        while True:
            try:
                place.lstat()
                break
            except FileNotFoundError:
                place = place.parent
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(b"0" * 4096)
    except OSError as error:
        raise UserError(
            f"{flag} {folder} cannot be written: {failure(OSError(error.errno, error.strerror))}"
        ) from error
