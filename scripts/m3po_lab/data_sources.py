# SPDX-License-Identifier: Apache-2.0
"""Where problems come from, and the forms in which datasets keep a question and its one checkable answer.

GSM8K's form, on the Hub or in a local JSONL; MATH, whose answers are LaTeX; multiple choice, whose answers are letters:
`mmlu_arc` is what HRPO trains on, MMLU's auxiliary training set and ARC-Challenge's together. The tasks of
`configs/eval` read their rows by the same functions. Tested on rows in the formats of the Hub's datasets only.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import load_dataset

from m3po_lab.config import UserError, one_line

GSM8K = "openai/gsm8k"
MATH = "EleutherAI/hendrycks_math"
MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
MMLU = "cais/mmlu"
ARC = "allenai/ai2_arc"
LETTERS = "ABCDEFGHIJ"
OFFLINE = "a local .jsonl in GSM8K's format or a reasoning-gym task"


@dataclass(frozen=True)
class Problem:
    """A question, its reference answer and the kind of it (`answers.KINDS`), the fields a prompt template may name."""

    question: str
    answer: str
    fields: dict[str, Any] = field(default_factory=dict, compare=False)
    kind: str = "number"


def read_jsonl(path: Path) -> list[Problem]:
    """Problems from a file with one JSON object a line, `question` and `answer` ending in ``#### <number>``.

    Raises:
        UserError: when the file is missing or a line does not have this form; the line is named.
    """
    return [gsm8k_problem(row["question"], row["answer"]) for row in jsonl_rows(path)]


def jsonl_rows(path: Path) -> list[dict[str, str]]:
    """The rows of such a file, each checked; the same errors."""
    if not path.is_file():
        raise UserError(f"--dataset {path} does not exist: give the path of a .jsonl file in GSM8K's format.")
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                gsm8k_problem(row["question"], row["answer"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{path}, line {number}: each line must be a JSON object with the texts 'question' and 'answer', "
                    "the answer ending in '#### <number>'."
                ) from error
            rows.append(row)
    return rows


def gsm8k_problem(question: str, answer: str) -> Problem:
    """A GSM8K row as a problem: the reference is what follows the last ``####``, thousands separators removed.

    Raises:
        ValueError: when the answer has no ``####`` or nothing behind it.
    """
    _, marker, reference = answer.rpartition("####")
    reference = reference.strip().replace(",", "")
    if not marker or not reference:
        raise ValueError("no '#### <number>' in the answer")
    return Problem(question.strip(), reference)


def math_problem(row: dict[str, Any]) -> Problem | None:
    """A row of MATH: the reference is the content of the solution's last box; None where there is none."""
    answer = boxed(row["solution"])
    return Problem(row["problem"], answer, kind="formula") if answer else None


def boxed(solution: str) -> str | None:
    r"""The content of the last ``\boxed{...}``, braces within it included; None without one, or if it is not closed."""
    _, box, rest = solution.rpartition("\\boxed")
    if not box or not rest.startswith("{"):
        return None
    depth = 0
    for match in re.finditer(r"\\.|[{}]", rest):  # a brace behind a backslash is text
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return rest[1 : match.start()].strip()
    return None


def choice_problem(question: str, choices: Sequence[str], answer: int) -> Problem:
    """A multiple-choice problem as the papers ask it (HRPO paper, figure 9); `answer` is the right one's position."""
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    return Problem(f"Question: {question}\nOptions:\n{options}", LETTERS[answer], kind="letter")


def mmlu_problem(row: dict[str, Any]) -> Problem:
    """A row of MMLU: the answer is the position of the right choice."""
    return choice_problem(row["question"], row["choices"], int(row["answer"]))


def arc_problem(row: dict[str, Any]) -> Problem:
    """A row of ARC: the answer is the label of the right choice, a letter or a digit; three to five choices."""
    choices = row["choices"]
    return choice_problem(row["question"], choices["text"], list(choices["label"]).index(row["answerKey"]))


def hub_rows(path: str, name: str | None, split: str, instead: str = OFFLINE) -> list[dict[str, Any]]:
    """A split of a dataset on the Hub or in its local cache.

    Raises:
        UserError: when it cannot be reached; `instead` is what --dataset may be without a network.
    """
    try:
        return load_dataset(path, name, split=split).to_list()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path} could not be loaded from the Hub ({one_line(error)[:150]}); without a network give --dataset "
            f"{instead}."
        ) from error


def _hub_gsm8k() -> list[Problem]:
    return [gsm8k_problem(row["question"], row["answer"]) for row in hub_rows(GSM8K, "main", "train")]


def _hub_math() -> list[Problem]:
    """MATH's train split, all subjects; a row whose solution has no closed box at its end is left out."""
    found = [math_problem(row) for subject in MATH_SUBJECTS for row in hub_rows(MATH, subject, "train")]
    return [problem for problem in found if problem is not None]


def _hub_mmlu_arc() -> list[Problem]:
    """MMLU's auxiliary_train and ARC-Challenge's train split."""
    mmlu = [mmlu_problem(row) for row in hub_rows(MMLU, "all", "auxiliary_train")]
    return mmlu + [arc_problem(row) for row in hub_rows(ARC, "ARC-Challenge", "train")]


HUB_PROBLEMS: dict[str, Callable[[], list[Problem]]] = {
    GSM8K: _hub_gsm8k,
    MATH: _hub_math,
    "mmlu_arc": _hub_mmlu_arc,
}
