# SPDX-License-Identifier: Apache-2.0
"""The folder of an evaluation's results: one for each checkpoint and options, and never written over by another."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl import ModelConfig

from m3po_lab.core.errors import PROJECT_ROOT, UserError
from m3po_lab.core.files import read_json, write_json
from m3po_lab.core.identity import short_digest
from m3po_lab.models.digest import model_digest

ABOUT_FILE = "evaluation_of.json"
RESULTS = ("results.json", "report.md")  # what an evaluation leaves at its end


def weights_of(name: str) -> dict[str, str]:
    """A model by its place (or its name, of one that is no local one) and by the digest of its content."""
    place = os.path.realpath(name) if os.path.exists(name) else name
    return {"place": place, "weights": short_digest(model_digest(ModelConfig(model_name_or_path=name)))}


def claim_results(given: str | None, name: str, about: Mapping[str, Any]) -> Path:
    """The folder of the results, made those of this evaluation by a file that says what they are of.

    Args:
        given: `--output_dir`; None takes `evals/<name>-<digest of about>`.
        name: readable, of the model and the options.
        about: all that the results hang on, as JSON values.

    Raises:
        UserError: the folder has another evaluation, stopped or finished, or results that do not say of what.
    """
    folder = Path(given) if given else PROJECT_ROOT / "evals" / f"{name}-{short_digest(about)[:8]}"
    stored = read_json(folder / ABOUT_FILE)
    results = [file for file in RESULTS if (folder / file).exists()]
    if stored is None and results:
        raise UserError(f"--output_dir {folder} has {results[0]} and no {ABOUT_FILE} that says of what: give another.")
    if stored is not None and stored != about:
        key = next(key for key in {**about, **stored} if stored.get(key) != about.get(key))
        raise UserError(
            f"--output_dir {folder} has an evaluation with another {key} ({stored.get(key)}, now {about.get(key)}): "
            "give another."
        )
    write_json(folder / ABOUT_FILE, about)
    return folder
