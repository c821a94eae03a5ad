# SPDX-License-Identifier: Apache-2.0
"""Answers: the shortcut for numbers agrees with math-verify; formulas are LaTeX, letters are read from a line."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from m3po_lab import answers

NUMBERS = [
    "0",
    "-0",
    "1",
    "-1",
    "7",
    "12",
    "-12",
    "120",
    "1000",
    "0.5",
    "0.50",
    "12.0",
    "3.1",
    "3.10",
    "0.3333",
    "0.3334",
    "999999999",
    "999999999.9999",
]


@pytest.mark.parametrize("reference", NUMBERS)
def test_shortcut_for_numbers_agrees_with_math_verify(reference: str) -> None:
    for answer in NUMBERS:
        assert answers.numbers_equal(reference, answer) == answers.math_verify_equal(reference, answer), answer


@pytest.mark.parametrize(
    ("reference", "answer", "equal"),
    [
        ("1234", "1,234", True),
        ("12", "$12", True),
        ("12", "12 apples", True),
        ("12", "12.", True),
        ("0.5", "\\frac{1}{2}", True),
        ("12", "twelve", False),
        ("-5", "5", False),
    ],
)
def test_other_answers_are_compared_by_math_verify(reference: str, answer: str, equal: bool) -> None:
    assert answers.numbers_equal(reference, answer) is equal


def test_math_verify_works_outside_the_main_thread() -> None:
    """Its time limit is a signal, which only the main thread can receive: without our check it raises here."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(answers.math_verify_equal, "12", "12 pears").result() is True


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("it is 1,234.", "1234"),
        ("20-5", "5"),
        ("below: -7", "-7"),
        ("3.50 dollars", "3.50"),
        ("#### 12 #### 14", "14"),
        ("no", None),
    ],
)
def test_last_number_of_a_text(text: str, number: str | None) -> None:
    assert answers.last_number(text) == number


@pytest.mark.parametrize(
    ("line", "letter"),
    [("B", "B"), ("(B)", "B"), ("B.", "B"), ("B) the forces", "B"), ("B. it", "B"), ("Both", None), ("b", None)],
)
def test_letter_of_an_answer_line(line: str, letter: str | None) -> None:
    assert answers.letter_of(line) == letter
    assert answers.KINDS["letter"].readable(line) == answers.KINDS["letter"].equal("B", line) == (letter == "B")


@pytest.mark.parametrize(
    ("reference", "answer", "equal"),
    [
        ("\\frac{1}{2}", "\\frac12", True),
        ("\\frac{1}{2}", "$0.5$", True),
        ("\\frac{1}{2}", "\\frac{1}{3}", False),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3, \\pi/2)", True),
        ("2\\sqrt{3}", "\\boxed{2\\sqrt{3}}", True),
        ("x^2+2x", "2x + x^2", True),
        ("\\text{Evelyn}", "\\text{Evelyn}", True),
        ("10", "1", False),
        ("\\$18,500", "18500", True),
        ("18.5", "\\$18.50", True),
        ("\\$5", "\\$6", False),
    ],
)
def test_formulas_are_compared_as_latex(reference: str, answer: str, equal: bool) -> None:
    """Without delimiters math-verify would see only the 1 of the first one."""
    assert answers.formulas_equal(reference, answer) == equal
