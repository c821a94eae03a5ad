# SPDX-License-Identifier: Apache-2.0
"""What a stopped evaluation leaves for the next try: `partial.jsonl`, the results of its finished parts."""

import hashlib
import json
from pathlib import Path
from typing import Any

from m3po_lab.core.files import write_text


class FinishedParts:
    """The finished parts of an evaluation (batches, or tasks), a line each, behind the key of all that they depend on.

    Args:
        file: where they lie; under another key it starts anew.
        depends_on: the model and how it decodes, as JSON values.
    """

    def __init__(self, file: Path, depends_on: Any) -> None:
        self.file = file
        self._depends_on = depends_on

    def read(self, *more: Any) -> list[Any]:
        """What `add` was given in earlier tries, in its order; nothing in a first try.

        Args:
            more: whatever else the parts depend on, as JSON values.
        """
        content = json.dumps([self._depends_on, *more], sort_keys=True, default=str)
        key = hashlib.sha256(content.encode()).hexdigest()
        lines = _whole_lines(self.file)
        parts = lines[1:] if lines[:1] == [key] else []
        write_text(self.file, "".join(json.dumps(line) + "\n" for line in [key, *parts]))
        return parts

    def add(self, part: Any) -> None:
        """Save the next part, as a JSON value."""
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(part) + "\n")

    def remove(self) -> None:
        """Delete the file: the evaluation has its report."""
        self.file.unlink(missing_ok=True)


def _whole_lines(file: Path) -> list[Any]:
    """The values of a JSONL file up to the first line that is cut short; empty when there is no file."""
    values: list[Any] = []
    try:
        for line in file.read_text(encoding="utf-8").rstrip("\n").split("\n"):
            values.append(json.loads(line))
    except (FileNotFoundError, ValueError):
        pass
    return values
