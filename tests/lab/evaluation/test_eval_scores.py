# SPDX-License-Identifier: Apache-2.0
"""Scores of a problem: strict is the reward's rule, flexible looks anywhere, the vote and pass@N count whole groups."""

import itertools
import random

import pytest

from m3po_lab.evaluation import scores as eval_scores
from m3po_lab.problems.answers import numbers_equal
from m3po_lab.problems.rewards import is_correct, is_formatted

TEXTS = ["so 12.\n#### 12", "#### 12 #### 12", "#### twelve", "#### 12\nand more", "12", "#### 12.0", "#### 13", ""]


def doc(reference: str, kind: str = "number") -> dict[str, str]:
    return {"reference": reference, "kind": kind, "marker": "####"}


@pytest.mark.parametrize("text", TEXTS)
def test_strict_match_and_form_are_those_of_the_rewards(text: str) -> None:
    """The report of a run and its rewards must not disagree on what right is."""
    scores = eval_scores.scores(doc("12"), [[text]])
    assert scores["strict_match"] == is_correct(text, "12", "####", "number")
    assert scores["well_formed"] == is_formatted(text, "####", "number")
    assert scores.keys() == {"strict_match", "flexible_match", "well_formed"}


def test_flexible_match_needs_no_marker() -> None:
    assert eval_scores.scores(doc("14"), [["12 and 2 make 14"]])["flexible_match"] == 1.0
    assert eval_scores.scores(doc("12"), [["12 and 2 make 14"]])["flexible_match"] == 0.0


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
    scores = eval_scores.scores(doc("5"), [answers])
    assert (scores["majority_vote"], scores["pass_at_n"]) == (majority, passed)
    assert scores["strict_match"] == sum(is_correct(answer, "5", "####", "number") for answer in answers) / len(answers)


def test_vote_does_not_depend_on_the_order_of_the_paths() -> None:
    answers = ["#### 5", "#### 4", "#### 4", "#### 5", "#### 3"]
    votes = {eval_scores.scores(doc("5"), [list(order)])["majority_vote"] for order in itertools.permutations(answers)}
    assert votes == {0.5}


def test_vote_is_the_expected_value_of_a_drawn_tie() -> None:
    lines = ["5", "4", "3", "3", "5"]
    draws = random.Random(0)
    drawn = sum(draws.choice(["5", "3"]) == "5" for _ in range(4000)) / 4000
    assert eval_scores.vote(lines, "5", numbers_equal) == pytest.approx(drawn, abs=0.05)


def test_last_letter_stands_alone() -> None:
    assert eval_scores.scores(doc("C", "letter"), [["Between B and C, BUT not DNA"]])["flexible_match"] == 1.0


@pytest.mark.parametrize(("kind", "strict"), [("letter", 0.0), ("number", 1.0), ("formula", 1.0)])
def test_answers_are_compared_as_the_kind_of_the_document(kind: str, strict: float) -> None:
    assert eval_scores.scores(doc("12", kind), [["#### 12.0"]])["strict_match"] == strict
