# SPDX-License-Identifier: Apache-2.0
"""Where problems come from, and the forms in which datasets keep a question and its one checkable answer.

GSM8K's form, on the Hub or in a local JSONL; MATH, whose answers are LaTeX; multiple choice, whose answers are letters:
`mmlu_arc` is what HRPO trains on, MMLU's auxiliary training set and ARC-Challenge's together. The tasks of
`configs/eval` read their rows by the same functions. Tested on rows in the formats of the Hub's datasets only.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import load_dataset

from m3po_lab.core.errors import UserError, short
from m3po_lab.core.hub import HUB_ERRORS
from m3po_lab.core.user_files import read_json_lines, text_field
from m3po_lab.problems.answers import is_number, is_reference

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
NAMED, SHOWN = 3, 40  # wrong references that an error names, and characters of each
REFERENCES = {
    "number": "one number on one line, with its unit if it has one, not a text, a list or something to work out",
    "formula": "one line of LaTeX",
    "letter": "one letter of the choices",
}
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
        UserError: when the file is missing or lines do not have this form; the first ones are named.
    """
    return [gsm8k_problem(row["question"], row["answer"]) for row in jsonl_rows(path)]


def jsonl_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of such a file, each checked; the errors of `read_jsonl`."""
    if not path.is_file():
        raise UserError(f"--dataset {path} does not exist: give the path of a .jsonl file in GSM8K's format.")
    rows, wrong = [], {}
    for number, row in read_json_lines(path):
        question, answer = (text_field(path, number, row, name) for name in ("question", "answer"))
        rows.append(row)
        try:
            problem = gsm8k_problem(question, answer)
        except ValueError:
            raise UserError(f"{path}, line {number}: the answer must end in '#### <number>'.") from None
        if not is_reference(problem.answer, problem.kind):
            wrong[f"line {number}"] = problem
    refuse_references(str(path), wrong)
    return rows


def check_references(source: str, splits: dict[str, list[Problem]]) -> None:
    """Refuse problems whose reference no answer could be compared with; every problem of every split is looked at.

    Raises:
        UserError: the first ones are named.
    """
    wrong = {
        f"{split} problem {number}": problem
        for split, problems in splits.items()
        for number, problem in enumerate(problems, start=1)
        if not is_reference(problem.answer, problem.kind)
    }
    refuse_references(source, wrong)


def refuse_references(source: str, wrong: dict[str, Problem]) -> None:
    """Raise an error that names the first of some problems, by where they are, if there are any."""
    if not wrong:
        return
    shown = ", ".join(f"{place} ({problem.answer[:SHOWN]!r})" for place, problem in list(wrong.items())[:NAMED])
    more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
    kind = next(iter(wrong.values())).kind
    raise UserError(f"--dataset {source}: {shown}{more}: a reference must be {REFERENCES[kind]}.")


def gsm8k_problem(question: str, answer: str) -> Problem:
    """A GSM8K row as a problem: the reference is what follows the last ``####``, a number without its separators.

    Raises:
        ValueError: when the answer has no ``####`` or nothing behind it.
    """
    _, marker, reference = answer.rpartition("####")
    reference = reference.strip()
    if not marker or not reference:
        raise ValueError("no '#### <number>' in the answer")
    return Problem(question.strip(), reference.replace(",", "") if is_number(reference) else reference)


def math_problem(row: dict[str, Any]) -> Problem | None:
    """A row of MATH: the reference is the content of the solution's last box; None where there is none."""
    answer = boxed(row["solution"])
    return Problem(row["problem"], " ".join(answer.split()), kind="formula") if answer else None


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
    except HUB_ERRORS as error:
        raise UserError(
            f"{path} could not be loaded from the Hub ({short(error, 160)}); without a network give --dataset "
            f"{instead}."
        ) from error


def _hub_gsm8k() -> list[Problem]:
    return [gsm8k_problem(row["question"], row["answer"]) for row in hub_rows(GSM8K, "main", "train")]


def _hub_math() -> list[Problem]:
    """MATH's train split, all subjects; a row whose solution has no closed box at its end is left out."""
    problems = [math_problem(row) for subject in MATH_SUBJECTS for row in hub_rows(MATH, subject, "train")]
    return [problem for problem in problems if problem is not None]


def _hub_mmlu_arc() -> list[Problem]:
    """MMLU's auxiliary_train and ARC-Challenge's train split."""
    mmlu = [mmlu_problem(row) for row in hub_rows(MMLU, "all", "auxiliary_train")]
    return mmlu + [arc_problem(row) for row in hub_rows(ARC, "ARC-Challenge", "train")]


HUB_PROBLEMS: dict[str, Callable[[], list[Problem]]] = {
    GSM8K: _hub_gsm8k,
    MATH: _hub_math,
    "mmlu_arc": _hub_mmlu_arc,
}
