# SPDX-License-Identifier: Apache-2.0
"""Numbers as people write them: read as a whole, in their usual spellings, and never worked out."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3po_lab.problems.quantities import read_quantity

VALUES = {
    "55": 55,
    "+18": 18,
    "-5": -5,
    "- 5": -5,
    "\u22125": -5,
    "\u20135": -5,
    "0.50": Fraction(1, 2),
    ".5": Fraction(1, 2),
    "5.": 5,
    "12.": 12,
    "1,234": 1234,
    "1,234.50": Fraction(2469, 2),
    "18,000,000": 18_000_000,
    "1 234": 1234,
    "1\u202f234": 1234,
    "1{,}234": 1234,
    "1\\,234": 1234,
    "3/4": Fraction(3, 4),
    "-3/4": Fraction(-3, 4),
    "12 / 5": Fraction(12, 5),
    "2 1/2": Fraction(5, 2),
    "-2 1/2": Fraction(-5, 2),
    "\u00bd": Fraction(1, 2),
    "2\u00bd": Fraction(5, 2),
    "\\frac{1}{2}": Fraction(1, 2),
    "\\frac12": Fraction(1, 2),
    "-\\dfrac{3}{4}": Fraction(-3, 4),
    "\\frac{-1}{2}": Fraction(-1, 2),
    "2\\frac{1}{2}": Fraction(5, 2),
    "1.5e3": 1500,
    "1.5 \\times 10^{3}": 1500,
    "2 × 10^-3": Fraction(1, 500),
    "18%": 18,
    "$18": 18,
    "\\$18": 18,
    "-$18": -18,
    "$-18": -18,
    "US$18": 18,
    "18 \u20ac": 18,
    "18 dollars a day": 18,
    "12 apples": 12,
    "12 more apples": 12,
    "12 km/h": 12,
    "12km": 12,
    "5 m^2": 5,
    "5 p.m.": 5,
    "18\\text{ cm}": 18,
    "18^\\circ": 18,
    "**18**": 18,
    "__18__": 18,
    "`18`": 18,
    "**18** apples": 18,
    "**$18**": 18,
    "18**": 18,
    "$18$": 18,
    "$$18$$": 18,
    "\\(18\\)": 18,
    "\\boxed{18}": 18,
    "$\\boxed{\\frac{1}{2}}$.": Fraction(1, 2),
    "(18)": 18,
    "x = 12": 12,
    "= 12": 12,
    "00012": 12,
}
TO_BE_WORKED_OUT = ["34 + 21", "34+21", "42*17", "42 × 17", "2**10", "**2**10", "2^10", "10^3", "10²", "36/2", "4/8"]
TO_BE_WORKED_OUT += ["36 / 2", "31/2/1", "\\frac{36}{2}", "\\frac{3+4}{2}", "3 3/2", "\\sqrt{4}", "5!", "20 × 10^3"]
TO_BE_WORKED_OUT += [
    "12-5",
    "12 - 5",
    "a = b = 5",
    "12 plus 5",
    "5 squared",
    "half of 12",
    "50% of 20",
    "\\binom{5}{2}",
]
NOT_ONE_NUMBER = ["10:30", "3 and 4", "12 or 13", "12 5", "12 minutes 30 seconds", "1/2/2024", "3, 4", "[1, 2]", "1,23"]
NOT_ONE_NUMBER += ["", " ", "-", "$", "yes", "twelve", "0x1a", "12x", "12xy", "12\u03c0", "2 x", "3 million", "2 dozen"]
NOT_ONE_NUMBER += [
    "--5",
    "+-5",
    "72\nSource: page 14",
    "1e999999",
    "9" * 5000,
    "The answer is 12",
    "12 and a half",
    "5k",
]


@pytest.mark.parametrize("text", VALUES)
def test_usual_spelling_of_a_number_is_read(text: str) -> None:
    found = read_quantity(text)
    assert found is not None
    assert found.value == VALUES[text]


@pytest.mark.parametrize("text", [*TO_BE_WORKED_OUT, *NOT_ONE_NUMBER])
def test_what_states_no_single_number_is_not_read(text: str) -> None:
    """math-verify works the first ones out, and takes one number of the others for the whole."""
    assert read_quantity(text) is None


@pytest.mark.parametrize(
    ("reference", "answer", "equal"),
    [
        ("12", "12.0", True),
        ("12 apples", "12", True),
        ("12", "12 apples", True),
        ("12 apples", "12 pears", False),
        ("12 apple", "12 Apples", True),
        ("5 am", "5 pm", False),
        ("5 km", "5 m", False),
        ("5 m²", "5 m^{2}", True),
        ("$12", "12 dollars", True),
        ("$12", "$12 per hour", True),
        ("$12", "12 €", False),
        ("50%", "50 per cent", True),
        ("50%", "50", True),
        ("50%", "0.5", True),
        ("0.5", "50%", True),
        ("50%", "0.5%", False),
        ("1/2", "0.5", True),
        ("1/3", "0.333333", True),
        ("1/3", "0.33", False),
        ("0.3333333333333333", "0.333333", True),
        ("0.0000001", "0.0000002", False),
        ("1e-7", "2e-7", False),
        ("-5", "5", False),
    ],
)
def test_numbers_are_equal_by_value_and_units_that_do_not_contradict(reference: str, answer: str, equal: bool) -> None:
    first, second = read_quantity(reference), read_quantity(answer)
    assert first is not None and second is not None
    assert first.equals(second) == second.equals(first) == equal


@given(
    st.integers(-(10**12), 10**12), st.integers(0, 4), st.sampled_from(["{}", "**{}**", "`{}`", "${}$", "{}.", "+{}"])
)
def test_written_number_is_read_as_itself(number: int, decimals: int, form: str) -> None:
    """Grouped or not, with the typographic minus or the other: the number that was written is the one that is read."""
    value = Fraction(number, 10**decimals)
    for text in (
        f"{number / 1:,.0f}" if not decimals else f"{float(value):.{decimals}f}",
        f"{float(value):,.{decimals}f}",
    ):
        marked = form.format(text.removeprefix("-")) if form.startswith("+") else form.format(text)
        wanted = abs(value) if form.startswith("+") else value
        for spelled in (marked, marked.replace("-", "\u2212")):
            found = read_quantity(spelled)
            assert found is not None and found.value == wanted, spelled


@given(st.integers(0, 999), st.integers(0, 999), st.sampled_from("+-*/×·^"))
def test_operation_on_two_numbers_is_never_their_result(a: int, b: int, sign: str) -> None:
    found = read_quantity(f"{a} {sign} {b}")
    assert found is None or (sign == "/" and found.value == Fraction(a, b) and found.value.denominator == b)
