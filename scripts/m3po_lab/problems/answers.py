# SPDX-License-Identifier: Apache-2.0
"""How answers are read and compared, by kind: numbers, LaTeX formulas, letters of a multiple-choice problem.

The rewards of a run and the scores of the tasks in `configs/eval` judge by the same `KINDS`, so that training and
evaluation cannot disagree on what right is. An answer is a value and never something to be worked out, or a model
would be rewarded for copying the problem: numbers are read by `quantities`, formulas are compared by math-verify where
they are finished (`is_finished`).
"""

import logging
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Any

import sympy
from math_verify import parse, verify

from m3po_lab.problems.quantities import SYMBOLS, Quantity, read_quantity, unmarked, usual_characters

SECONDS_PER_ANSWER = 2  # math-verify interrupts itself by a signal after this; possible in the main thread only
LAST_NUMBER = re.compile(r"(?:(?<!\d)-)?(?:\d+/\d+|(?:\d+(?:,\d{3})*)?\.\d+|\d+(?:,\d{3})*)%?")
LETTER_LINE = re.compile(r"\(?([A-Z])\)?(?:[.:)].*)?")  # A, (A), A., A) text
LETTER = re.compile(r"(?<!\w)[A-J](?!\w)")
DOLLAR = re.compile(r"(?<!\\)\$")
FORMULAS = re.compile(r"(?<!\\)\$\$?(.+?)(?<!\\)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
BOX = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
FRACTION = re.compile(  # math-verify works it out
    r"\\[dt]?frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))|(?<![\w^.}])(\d+)\s*/\s*(\d+)"
)
UNREAD = re.compile(
    r"\\(?:overline|binom|dot)(?![a-zA-Z])|\d:\d|\*\*"
)  # math-verify evaluates these or reads them in part

Equal = Callable[[str, str], bool]


@dataclass(frozen=True)
class Kind:
    """How answers of a kind are read: equality with a reference, what is readable, the last one in a text."""

    equal: Equal
    readable: Callable[[str], bool]
    last: Callable[[str], str | None]


def numbers_equal(reference: str, answer: str) -> bool:
    """Whether both lines state the same number."""
    expected, stated = read_quantity(reference), read_quantity(answer)
    return expected is not None and stated is not None and expected.equals(stated)


def is_number(line: str) -> bool:
    """Whether a line states a number, and one only."""
    return read_quantity(line) is not None


def last_number(text: str) -> str | None:
    """The last number of a text without thousands separators; a minus behind a digit is a subtraction."""
    numbers = LAST_NUMBER.findall(usual_characters(text))
    return numbers[-1].replace(",", "") if numbers else None


@lru_cache(maxsize=65536)
def formulas_equal(reference: str, answer: str) -> bool:
    """Whether an answer line is the formula of the reference: spelled as it is, or finished and equal to it.

    Where the reference is a number the answer has to be one too.
    """
    expected, stated = formula_of(reference), formula_of(answer)
    if expected is None or stated is None:
        return False
    if "".join(expected.split()) == "".join(stated.split()):
        return True
    number, answer_number = _plain_number(expected), _plain_number(stated)
    if number is not None and answer_number is not None:
        return number.equals(answer_number)
    if UNREAD.search(expected) or not is_finished(stated) or (number is not None and not _states_number(stated)):
        return False
    return bool(verify(_parse(expected), _parse(stated), timeout_seconds=_seconds()))


def _plain_number(formula: str) -> Quantity | None:
    """The number that a formula is; None where letters follow it, which may be variables."""
    number = read_quantity(formula)
    return number if number is not None and number.unit <= SYMBOLS else None


def _states_number(formula: str) -> bool:
    """Whether all that math-verify reads in a formula is a rational number."""
    return all(_is_rational(expression) for expression in _parse(formula) if isinstance(expression, sympy.Basic))


def is_formula(line: str) -> bool:
    """Whether an answer line is one finished formula."""
    formula = formula_of(line)
    return formula is not None and (_plain_number(formula) is not None or is_finished(formula))


def formula_of(line: str) -> str | None:
    """The one formula of a line: the line itself, or what stands between its only marks, with words around it."""
    marked = [*FORMULAS.finditer(line)] or [*BOX.finditer(line)]
    if marked and marked[0].span() != (0, len(line)):
        around = line[: marked[0].start()] + line[marked[0].end() :]
        if len(marked) > 1 or re.search(r"[\d\\$=+]", around):
            return None
        line = marked[0][0]
    return unmarked(line) or None


def last_formula(text: str) -> str | None:
    """The last formula between marks in a text; where there are none, its last line."""
    marked = [*FORMULAS.finditer(text), *BOX.finditer(text)]
    if marked:
        return max(marked, key=lambda match: match.end())[0]
    lines = text.strip().rsplit("\n", maxsplit=1)
    return lines[-1] or None


@lru_cache(maxsize=65536)
def is_finished(formula: str) -> bool:
    """Whether math-verify reads a formula and no operation on two of its numbers is left to be worked out."""
    if UNREAD.search(formula):
        return False
    fractions = ([int(number) for number in match if number] for match in FRACTION.findall(formula))
    if any(below < 2 or gcd(above, below) > 1 for above, below in fractions):
        return False
    read = [expression for expression in _parse(formula) if isinstance(expression, sympy.Basic | sympy.MatrixBase)]
    return bool(read) and all(map(_is_worked_out, read))


def _is_worked_out(expression: Any) -> bool:
    """Whether no sum, product, power or function of numbers alone in an expression could be worked out further."""
    if isinstance(expression, sympy.MatrixBase):
        return all(map(_is_worked_out, expression.flat()))
    if isinstance(expression, sympy.Add) and sum(map(_is_rational, expression.args)) > 1:
        return False
    if isinstance(expression, sympy.Mul):
        factors = [factor for factor in sympy.Mul.make_args(expression) if factor != -1]
        above = [factor for factor in factors if factor.is_Integer]
        below = [factor.base for factor in factors if factor.is_Pow and factor.exp == -1 and factor.base.is_Integer]
        mixed = above and below and gcd(int(above[0]), int(below[0])) > 1
        if len(above) > 1 or len(below) > 1 or mixed:
            return False
        return all(_is_worked_out(factor) for factor in factors if not (factor.is_Pow and factor.base in below))
    if isinstance(expression, sympy.Pow) and _is_rational(expression.base):
        root = expression.exp.is_Rational and not expression.exp.is_Integer
        return bool(root or expression.exp.free_symbols) and not _is_perfect_power(expression)
    if isinstance(expression, sympy.factorial) and not expression.free_symbols:
        return False
    return all(map(_is_worked_out, expression.args))


def _is_rational(expression: Any) -> bool:
    """Whether an expression is rational numbers under sums, products and whole powers only; nothing is evaluated."""
    if expression.is_Rational or expression.is_Float:
        return True
    if isinstance(expression, sympy.Pow):
        return bool(expression.exp.is_Integer) and _is_rational(expression.base)
    parts = isinstance(expression, sympy.Add | sympy.Mul | sympy.UnevaluatedExpr)
    return parts and all(map(_is_rational, expression.args))


def _is_perfect_power(root: Any) -> bool:
    """Whether a root of a whole number is a whole number, as that of 4."""
    if not (root.base.is_Integer and root.base >= 0 and root.exp.is_Rational):
        return False
    return bool(sympy.integer_nthroot(int(root.base), int(root.exp.q))[1])


def letter_of(line: str) -> str | None:
    """The letter that an answer line gives: `B`, `(B)`, `**B**`, `B.` or `B) text`."""
    match = LETTER_LINE.fullmatch(line) or LETTER_LINE.fullmatch(unmarked(line))
    return match[1] if match else None


def letters_equal(reference: str, answer: str) -> bool:
    """Whether an answer line gives the letter of the reference."""
    return letter_of(answer) == reference


def gives_letter(line: str) -> bool:
    """Whether an answer line gives a letter."""
    return letter_of(line) is not None


def last_letter(text: str) -> str | None:
    """The last capital that stands alone in a text."""
    letters = LETTER.findall(text)
    return letters[-1] if letters else None


def is_reference(reference: str, kind: str) -> bool:
    """Whether a reference can be answered: one line, and of a number or a letter one that is read as a whole.

    A formula need not be read, since an answer that is spelled as the reference is right.
    """
    if not reference.strip() or "\n" in reference:
        return False
    return kind == "formula" or KINDS[kind].equal(reference, reference)


def _parse(formula: str) -> list[Any]:
    """What math-verify makes of a formula: expressions and the text that they were read from."""
    return parse(f"${formula}$", parsing_timeout=_seconds())


def _seconds() -> int | None:
    """Math-verify's time limit; None (no limit) outside the main thread, where its signal cannot be delivered."""
    if threading.current_thread() is threading.main_thread():
        return SECONDS_PER_ANSWER
    for name in ("math_verify.parser", "math_verify.grader", "math_verify.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)  # it warns about the missing limit at every call
    return None


KINDS = {
    "number": Kind(numbers_equal, is_number, last_number),
    "formula": Kind(formulas_equal, is_formula, last_formula),
    "letter": Kind(letters_equal, gives_letter, last_letter),
}
