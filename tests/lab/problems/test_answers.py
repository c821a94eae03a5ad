# SPDX-License-Identifier: Apache-2.0
"""Answers: numbers agree with math-verify where it reads them whole; formulas are finished LaTeX, letters one line."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from math_verify import parse, verify

from m3po_lab.evaluation import scores as eval_scores
from m3po_lab.problems import answers
from m3po_lab.problems.rewards import is_correct, is_formatted

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
def test_plain_numbers_are_compared_as_math_verify_compares_them(reference: str) -> None:
    for answer in NUMBERS:
        assert answers.numbers_equal(reference, answer) == verify(parse(reference), parse(answer)), answer


def test_math_verify_works_outside_the_main_thread() -> None:
    """Its time limit is a signal, which only the main thread can receive: without our check it raises here."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(answers.formulas_equal, "x + 1", "1 + x").result() is True


@pytest.mark.parametrize("kind", ["number", "formula"])
@pytest.mark.parametrize(
    ("reference", "answer"),
    [("55", "34 + 21"), ("714", "42*17"), ("1024", "2**10"), ("18", "36/2"), ("3", "\\sqrt{9}")],
)
def test_copied_problem_is_no_answer(reference: str, answer: str, kind: str) -> None:
    """Otherwise copying the prompt solves every task of arithmetic."""
    text = f"{answer} = 56.\n#### {answer}"
    assert not is_correct(text, reference, "####", kind)
    assert not is_formatted(text, "####", kind)
    scored = eval_scores.scores({"reference": reference, "kind": kind, "marker": "####"}, [[text, text]])
    assert not any(scored.values())


WRITTEN = ["12", "2 1/2", "\u22125", "\\$18", "+18", "**18**", "`18`", "1,234", "50%", "\\frac{1}{2}", "12 apples", "B"]
WRITTEN += ["10:30", "x^2", "34 + 21", "(A) it", "**B**", "$x$", "\\boxed{3}"]


@given(
    st.sampled_from(["number", "formula", "letter"]),
    st.sampled_from(WRITTEN),
    st.sampled_from(WRITTEN),
    st.sampled_from(
        ["#### {}", "so\n#### {}", "3 or 4\n#### {}.", "**#### {}**", "{}", "it is {}, not 7", "#### {}\n9"]
    ),
)
def test_flexible_match_is_never_stricter_than_the_strict_one(
    kind: str, reference: str, answer: str, text: str
) -> None:
    document = {"reference": reference, "kind": kind, "marker": "####"}
    scored = eval_scores.scores(document, [[text.format(answer)]])
    assert scored["flexible_match"] >= scored["strict_match"]


@pytest.mark.parametrize(
    ("kind", "reference"), [("number", n) for n in NUMBERS] + [("letter", "B"), ("formula", "yes")]
)
def test_reference_that_is_accepted_is_right_as_an_answer(kind: str, reference: str) -> None:
    assert answers.is_reference(reference, kind)
    assert is_correct(f"#### {reference}", reference, "####", kind)


@pytest.mark.parametrize(
    ("kind", "reference"),
    [
        ("number", "yes"),
        ("number", "10:30"),
        ("number", "3 and 4"),
        ("number", "72\nSource: page 14"),
        ("number", "34 + 21"),
        ("letter", "Both"),
        ("letter", "(B)"),
        ("formula", " "),
        ("formula", "1\n2"),
    ],
)
def test_reference_that_would_be_read_in_part_or_never_is_refused(kind: str, reference: str) -> None:
    assert not answers.is_reference(reference, kind)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("it is 1,234.", "1234"),
        ("20-5", "5"),
        ("below: -7", "-7"),
        ("3.50 dollars", "3.50"),
        ("#### 12 #### 14", "14"),
        ("20\u22125", "5"),
        ("below: \u22127", "-7"),
        ("it is 3/4.", "3/4"),
        ("about 50%", "50%"),
        ("no", None),
    ],
)
def test_last_number_of_a_text(text: str, number: str | None) -> None:
    assert answers.last_number(text) == number


@pytest.mark.parametrize(
    ("line", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B) the forces", "B"),
        ("B. it", "B"),
        ("Both", None),
        ("b", None),
        ("**B**", "B"),
        ("\\boxed{B}", "B"),
    ],
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
        ("55", "$34+21$", False),
        ("\\frac{1}{2}", "\\frac{2}{4}", False),
        ("x+7", "x+3+4", False),
        ("6\\pi", "2\\cdot 3\\pi", False),
        ("3", "\\log_2 8", False),
        ("2", "\\sqrt{4}", False),
        ("2^{10}", "2^{10}", True),
        ("10:30", "10:30", True),
        ("10:30", "1:3", False),
        ("0.\\overline{3}", "0", False),
        ("0.\\overline{3}", "0.\\overline{3}", True),
        ("4", "$3$ and $4$", False),
        ("4", "The answer is $4$.", True),
        ("12xy", "12", False),
        ("5x^2", "5x^{2}", True),
        ("-5", "\u22125", True),
        ("10\\text{ cm}", "10", True),
        ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", True),
        ("(-\\infty, 2]", "(-\\infty,2]", True),
        ("9", "9^{9^{9^{9}}}", False),
    ],
)
def test_formulas_are_compared_as_latex(reference: str, answer: str, equal: bool) -> None:
    """Without delimiters math-verify would see only the 1 of the first one."""
    assert answers.formulas_equal(reference, answer) == equal
