# SPDX-License-Identifier: Apache-2.0
"""What a stopped evaluation leaves for the next try: `partial.jsonl`, the completions of its finished batches."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m3po_lab.core.files import write_text


class FinishedBatches:
    """The finished batches of an evaluation, a line each, behind a line with the key of all that they depend on.

    Args:
        file: where they lie; under another key it starts anew.
        about: the model and how it decodes, as JSON values.
    """

    def __init__(self, file: Path, about: Any) -> None:
        self.file = file
        self._about = about

    def read(self, requests: Sequence[Any], batches: Sequence[Sequence[int]]) -> list[Any]:
        """What `add` was given of the first batches, as far as they are done; nothing for a first try.

        Args:
            requests: prompt and decoding options of every completion.
            batches: the requests of each batch, by position.
        """
        content = json.dumps([self._about, requests, batches], sort_keys=True, default=str)
        key = hashlib.sha256(content.encode()).hexdigest()
        found = _whole_lines(self.file)
        done = found[1:] if found[:1] == [key] else []
        write_text(self.file, "".join(json.dumps(line) + "\n" for line in [key, *done]))
        return done

    def add(self, batch: Any) -> None:
        """Keep the next batch: its completions, and what else is known of it, as JSON values."""
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(batch) + "\n")

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
