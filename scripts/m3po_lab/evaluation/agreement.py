# SPDX-License-Identifier: Apache-2.0
"""Whether an evaluation finds what the report of the run says, problem by problem.

Both go through `evaluate.run_tasks` with `configs/eval/problems.yaml`. What may differ is rounding: another device,
thread count or version of a library, and with it a token here and there.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m3po_lab.core.files import read_json, shown_path
from m3po_lab.models.embedded import EMBEDDED_MODEL

VERDICTS = {"after": "correct", "before": "correct_before"}  # completion and verdict in a line of completions.jsonl


def agreement(model: str, problems_of: str | None, samples: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """How many of the greedy `samples` of task `problems` the report has, None where no report speaks of them.

    Args:
        model: what was evaluated: `final/` of a run, or the model that the run of `problems_of` started from.
        problems_of: the checkpoint that the problems came from; None if it is the model.
    """
    report = _report_of(model, problems_of)
    if report is None:
        return None
    run, column = report
    lines = (run / "completions.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    pairs = list(zip(samples, (json.loads(line) for line in lines), strict=False))  # --limit: the first ones
    if len(pairs) < len(samples) or any(row["doc"]["question"] != line["question"] for row, line in pairs):
        return None
    verdicts = [(row["strict_match"] == 1.0) == line[VERDICTS[column]] for row, line in pairs]
    return {
        "run": shown_path(run),
        "training": column,
        "problems": len(pairs),
        "same_verdict": sum(verdicts),
        "same_completion": sum(row["resps"][0][0] == line[column] for row, line in pairs),
    }


def agreement_line(counts: dict[str, Any]) -> str:
    """An agreement in one line."""
    return (
        f"report of {counts['run']}, {counts['training']} training: the same verdict on {counts['same_verdict']} and "
        f"the same text for {counts['same_completion']} of {counts['problems']} problems"
    )


def _report_of(model: str, problems_of: str | None) -> tuple[Path, str] | None:
    """The run folder whose report speaks of `model`, and whether `after` or `before` training."""
    checkpoint = Path(os.path.abspath(problems_of or model))
    run = checkpoint.parent
    summary = read_json(run / "summary.json")
    if checkpoint.name != "final" or summary is None or not (run / "completions.jsonl").is_file():
        return None
    if os.path.abspath(model) == str(checkpoint):
        return run, "after"
    start = summary["config"].get("model_name_or_path") or EMBEDDED_MODEL
    return (run, "before") if model == start else None
