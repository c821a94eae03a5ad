# SPDX-License-Identifier: Apache-2.0
"""How answers are read and compared, by kind: numbers, LaTeX formulas, letters of a multiple-choice problem.

The rewards of a run and the scores of the tasks in `configs/eval` judge by the same `KINDS`, so that training and
evaluation cannot disagree on what right is. Numbers and formulas go through math-verify.
"""

import logging
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

PLAIN_NUMBER = re.compile(r"-?(0|[1-9]\d{0,8})(\.\d{1,4})?")  # well within the digits math-verify compares
SECONDS_PER_ANSWER = 2  # math-verify interrupts itself by a signal after this; possible in the main thread only
NUMBER = re.compile(r"(?:(?<!\d)-)?\d+(?:,\d{3})*(?:\.\d+)?")
LETTER_LINE = re.compile(r"\(?([A-Z])\)?(?:[.:)].*)?")  # A, (A), A., A) text
LETTER = re.compile(r"(?<!\w)[A-J](?!\w)")
DOLLAR = re.compile(r"(?<!\\)\$")

Equal = Callable[[str, str], bool]


@dataclass(frozen=True)
class Kind:
    """How answers of a kind are read: equality with a reference, what is readable, the last one in a text."""

    equal: Equal
    readable: Callable[[str], bool]
    last: Callable[[str], str | None]


@lru_cache(maxsize=65536)
def numbers_equal(reference: str, answer: str) -> bool:
    """Math-verify's verdict on two answers, with a shortcut for plain numbers whose verdict is certain."""
    if PLAIN_NUMBER.fullmatch(reference) and PLAIN_NUMBER.fullmatch(answer):
        return Decimal(reference) == Decimal(answer)
    return math_verify_equal(reference, answer)


def math_verify_equal(reference: str, answer: str) -> bool:
    """Whether math-verify finds `answer` equal to `reference`; the order matters to it."""
    return bool(verify(_parse(reference), _parse(answer), timeout_seconds=_seconds()))


@lru_cache(maxsize=65536)
def is_comparable(answer: str) -> bool:
    """Whether math-verify finds something to compare in `answer`."""
    return bool(PLAIN_NUMBER.fullmatch(answer)) or bool(_parse(answer))


def last_number(text: str) -> str | None:
    """The last number of a text without thousands separators; a minus behind a digit is a subtraction."""
    found = NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None


def delimited(formula: str) -> str:
    r"""LaTeX as math-verify finds it in a text: between dollars, unless marked already; `\$` is a price and no mark."""
    marked = DOLLAR.search(formula) or any(mark in formula for mark in ("\\(", "\\[", "\\boxed"))
    return formula if marked else f"${formula}$"


@lru_cache(maxsize=65536)
def formulas_equal(reference: str, answer: str) -> bool:
    """Math-verify's verdict on two formulas; of a longer text it takes the last one."""
    return math_verify_equal(delimited(reference), delimited(answer))


def is_formula(line: str) -> bool:
    """Whether math-verify finds a formula in an answer line."""
    return is_comparable(delimited(line))


def letter_of(line: str) -> str | None:
    """The letter that an answer line gives: `B`, `(B)`, `B.` or `B) text`."""
    match = LETTER_LINE.fullmatch(line)
    return match[1] if match else None


def letters_equal(reference: str, answer: str) -> bool:
    """Whether an answer line gives the letter of the reference."""
    return letter_of(answer) == reference


def gives_letter(line: str) -> bool:
    """Whether an answer line gives a letter."""
    return letter_of(line) is not None


def last_letter(text: str) -> str | None:
    """The last capital that stands alone in a text."""
    found = LETTER.findall(text)
    return found[-1] if found else None


def _parse(answer: str) -> list[Any]:
    return parse(answer, parsing_timeout=_seconds())


def _seconds() -> int | None:
    """Math-verify's time limit; None (no limit) outside the main thread, where its signal cannot be delivered."""
    if threading.current_thread() is threading.main_thread():
        return SECONDS_PER_ANSWER
    for name in ("math_verify.parser", "math_verify.grader", "math_verify.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)  # it warns about the missing limit at every call
    return None


KINDS = {
    "number": Kind(numbers_equal, is_comparable, last_number),  # or anything math-verify reads without delimiters
    "formula": Kind(formulas_equal, is_formula, str),
    "letter": Kind(letters_equal, gives_letter, last_letter),
}
