# SPDX-License-Identifier: Apache-2.0
"""Scores of a problem: strict is the reward's rule, flexible looks anywhere, the vote and pass@N count whole groups."""

import itertools
import random

import pytest

from m3po_lab import eval_scores
from m3po_lab.rewards import is_correct, is_formatted

TEXTS = ["so 12.\n#### 12", "#### 12 #### 12", "#### twelve", "#### 12\nand more", "12", "#### 12.0", "#### 13", ""]


def doc(reference: str, marker: str = "####") -> dict[str, str]:
    return {"reference": reference, "marker": marker}


@pytest.mark.parametrize("text", TEXTS)
def test_strict_match_and_form_are_those_of_the_rewards(text: str) -> None:
    """The report of a run and its rewards must not disagree on what right is."""
    scores = eval_scores.numbers(doc("12"), [[text]])
    assert scores["strict_match"] == is_correct(text, "12", "####")
    assert scores["well_formed"] == is_formatted(text, "####")
    assert scores.keys() == {"strict_match", "flexible_match", "well_formed"}


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
    assert eval_scores.last_number(text) == number


def test_flexible_match_needs_no_marker() -> None:
    assert eval_scores.numbers(doc("14"), [["12 and 2 make 14"]])["flexible_match"] == 1.0
    assert eval_scores.numbers(doc("12"), [["12 and 2 make 14"]])["flexible_match"] == 0.0


@pytest.mark.parametrize(
    ("answers", "majority", "passed"),
    [
        (["#### 5", "#### 5.0", "#### 4"], 1.0, 1.0),
        (["#### 4", "#### 4", "#### 5"], 0.0, 1.0),
        (["#### 5", "#### 4", "no", "no"], 0.5, 1.0),
        (["#### 5", "#### 4", "#### 3", "#### 2"], 0.25, 1.0),
        (["5", "5", "#### 4"], 0.0, 0.0),
        (["no", "none"], 0.0, 0.0),
    ],
)
def test_vote_and_pass_of_a_group(answers: list[str], majority: float, passed: float) -> None:
    """Equal answers vote together however they are written, ill-formed ones do not vote, a tie counts by its share."""
    scores = eval_scores.numbers(doc("5"), [answers])
    assert (scores["majority_vote"], scores["pass_at_n"]) == (majority, passed)
    assert scores["strict_match"] == sum(is_correct(answer, "5", "####") for answer in answers) / len(answers)


def test_vote_does_not_depend_on_the_order_of_the_paths() -> None:
    answers = ["#### 5", "#### 4", "#### 4", "#### 5", "#### 3"]
    votes = {eval_scores.numbers(doc("5"), [list(order)])["majority_vote"] for order in itertools.permutations(answers)}
    assert votes == {0.5}


def test_vote_is_the_expected_value_of_a_drawn_tie() -> None:
    lines = ["5", "4", "3", "3", "5"]
    draws = random.Random(0)
    drawn = sum(draws.choice(["5", "3"]) == "5" for _ in range(4000)) / 4000
    assert eval_scores.vote(lines, "5", eval_scores.answers_equal) == pytest.approx(drawn, abs=0.05)


@pytest.mark.parametrize(
    ("line", "letter"),
    [("B", "B"), ("(B)", "B"), ("B.", "B"), ("B) the forces", "B"), ("B. it", "B"), ("Both", None), ("b", None)],
)
def test_letter_of_an_answer_line(line: str, letter: str | None) -> None:
    assert eval_scores.letter_of(line) == letter
    assert eval_scores.letters(doc("B"), [[f"#### {line}"]])["strict_match"] == (letter == "B")


def test_last_letter_stands_alone() -> None:
    assert eval_scores.letters(doc("C"), [["Between B and C, BUT not DNA"]])["flexible_match"] == 1.0


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
    ],
)
def test_formulas_are_compared_as_latex(reference: str, answer: str, equal: bool) -> None:
    """Without delimiters math-verify would see only the 1 of the first one."""
    assert eval_scores.formulas(doc(reference), [[f"so\n#### {answer}"]])["strict_match"] == equal
