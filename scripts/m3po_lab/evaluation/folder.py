# SPDX-License-Identifier: Apache-2.0
"""The folder of an evaluation's results: one for each checkpoint and options, and never written over by another.

An evaluation that was stopped leaves the results of its finished parts there, `partial.jsonl`, for the next try.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl import ModelConfig

from m3po_lab.core.errors import PROJECT_ROOT, UserError
from m3po_lab.core.files import read_json, write_json, write_text
from m3po_lab.core.identity import short_digest
from m3po_lab.models.digest import model_digest

ABOUT_FILE = "evaluation_of.json"
RESULTS = ("results.json", "report.md")  # what an evaluation leaves at its end


def weights_of(name: str) -> dict[str, str]:
    """A model by its place (or its name, of one that is no local one) and by the digest of its content."""
    place = os.path.realpath(name) if os.path.exists(name) else name
    return {"place": place, "weights": short_digest(model_digest(ModelConfig(model_name_or_path=name)))}


def claim_results(output_dir: str | None, name: str, depends_on: Mapping[str, Any]) -> Path:
    """The folder of the results, made those of this evaluation by a file that says what they are of.

    Args:
        output_dir: `--output_dir`; None takes `evals/<name>-<digest of depends_on>`.
        name: readable, of the model and the options.
        depends_on: all that the results depend on, as JSON values.

    Raises:
        UserError: the folder has another evaluation, stopped or finished, or results that do not say of what.
    """
    folder = Path(output_dir) if output_dir else PROJECT_ROOT / "evals" / f"{name}-{short_digest(depends_on)[:8]}"
    stored = read_json(folder / ABOUT_FILE)
    results = [file for file in RESULTS if (folder / file).exists()]
    if stored is None and results:
        raise UserError(f"--output_dir {folder} has {results[0]} and no {ABOUT_FILE} that says of what: give another.")
    if stored is not None and stored != depends_on:
        key = next(key for key in {**depends_on, **stored} if stored.get(key) != depends_on.get(key))
        raise UserError(
            f"--output_dir {folder} has an evaluation with another {key} ({stored.get(key)}, now "
            f"{depends_on.get(key)}): give another."
        )
    write_json(folder / ABOUT_FILE, depends_on)
    return folder


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
        """The parts that `add` has saved in earlier tries, in order; none in a first try.

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
