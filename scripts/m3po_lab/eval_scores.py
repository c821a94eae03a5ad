# SPDX-License-Identifier: Apache-2.0
"""How the tasks of `configs/eval` score a problem's completions: lm-eval calls these as `process_results`.

Strict: exactly one answer marker, and the line behind it equals the reference (the rule of the correct reward).
Flexible: the last number, formula or letter of the text equals it, wherever it stands. With N paths both are means over
the paths, and two more follow: the majority vote over the well-formed answer lines, and pass@N. A tied vote counts by
the share of right answers among the tied, its expected value under a draw; pass@N from N samples is unbiased as it is.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from m3po_lab.rewards import answer_line, answers_equal, is_comparable, math_verify_equal

NUMBER = re.compile(r"(?:(?<!\d)-)?\d+(?:,\d{3})*(?:\.\d+)?")
LETTER_LINE = re.compile(r"\(?([A-Z])\)?(?:[.:)].*)?")  # A, (A), A., A) text
LETTER = re.compile(r"(?<!\w)[A-J](?!\w)")

Equal = Callable[[str, str], bool]


@dataclass(frozen=True)
class Kind:
    """How answers of a kind are read: equality with a reference, what is readable, the last one in a text."""

    equal: Equal
    readable: Callable[[str], bool]
    last: Callable[[str], str | None]


def numbers(doc: dict[str, Any], responses: Sequence[Sequence[str]]) -> dict[str, float]:
    """Scores of a problem whose answer is a number, or anything math-verify reads without delimiters."""
    return score(doc, responses[0], Kind(answers_equal, is_comparable, last_number))


def formulas(doc: dict[str, Any], responses: Sequence[Sequence[str]]) -> dict[str, float]:
    """Scores of a problem whose answer is LaTeX."""
    return score(doc, responses[0], Kind(formulas_equal, lambda line: is_comparable(delimited(line)), str))


def letters(doc: dict[str, Any], responses: Sequence[Sequence[str]]) -> dict[str, float]:
    """Scores of a multiple-choice problem whose answer is a letter."""
    return score(doc, responses[0], Kind(letters_equal, lambda line: letter_of(line) is not None, last_letter))


def score(doc: dict[str, Any], texts: Sequence[str], kind: Kind) -> dict[str, float]:
    """The scores of one problem's completions, each in [0, 1]."""
    reference = doc["reference"]
    lines = [answer_line(text, doc["marker"]) for text in texts]
    right = [line is not None and kind.equal(reference, line) for line in lines]
    formed = [line for line in lines if line is not None and kind.readable(line)]
    ends = [kind.last(text) for text in texts]
    scores = {
        "strict_match": sum(right) / len(texts),
        "flexible_match": sum(end is not None and kind.equal(reference, end) for end in ends) / len(texts),
        "well_formed": len(formed) / len(texts),
    }
    if len(texts) > 1:
        scores |= {"majority_vote": vote(formed, reference, kind.equal), "pass_at_n": float(any(right))}
    return scores


def vote(lines: Sequence[str], reference: str, equal: Equal) -> float:
    """1.0 when the most frequent answer is right, 0.0 when it is not, the share of right ones when several tie."""
    classes: list[list[str]] = []
    for line in lines:
        for members in classes:
            if equal(members[0], line):
                members.append(line)
                break
        else:
            classes.append([line])
    most = max((len(members) for members in classes), default=0)
    tied = [members[0] for members in classes if len(members) == most]
    return sum(equal(reference, answer) for answer in tied) / len(tied) if tied else 0.0


def last_number(text: str) -> str | None:
    """The last number of a text without thousands separators; a minus behind a digit is a subtraction."""
    found = NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None


def delimited(formula: str) -> str:
    """LaTeX as math-verify finds it in a text: between dollars, unless it is marked already."""
    return formula if any(mark in formula for mark in ("$", "\\(", "\\[", "\\boxed")) else f"${formula}$"


def formulas_equal(reference: str, answer: str) -> bool:
    """Math-verify's verdict on two formulas; of a longer text it takes the last one."""
    return math_verify_equal(delimited(reference), delimited(answer))


def letter_of(line: str) -> str | None:
    """The letter that an answer line gives: `B`, `(B)`, `B.` or `B) text`."""
    match = LETTER_LINE.fullmatch(line)
    return match[1] if match else None


def letters_equal(reference: str, answer: str) -> bool:
    """Whether an answer line gives the letter of the reference."""
    return letter_of(answer) == reference


def last_letter(text: str) -> str | None:
    """The last capital that stands alone in a text."""
    found = LETTER.findall(text)
    return found[-1] if found else None
