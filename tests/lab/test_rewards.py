# SPDX-License-Identifier: Apache-2.0
"""Rewards: the shortcut for numbers agrees with math-verify, and the form is judged as the docstrings say."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from m3po_lab import rewards

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
        assert rewards.answers_equal(reference, answer) == rewards.math_verify_equal(reference, answer), answer


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
    assert rewards.answers_equal(reference, answer) is equal


@pytest.mark.parametrize(
    ("text", "correct", "form"),
    [
        ("5 + 7 = 12\n#### 12", 1.0, 1.0),
        ("#### 12", 1.0, 1.0),
        ("5 + 7 = 13\n#### 13", 0.0, 1.0),
        ("the answer is 12", 0.0, 0.0),
        ("#### 12\n#### 12", 0.0, 0.0),
        ("####", 0.0, 0.5),
        ("#### twelve", 0.0, 0.5),
        ("#### 12\nWhat is 1 + 11?", 0.0, 0.5),
    ],
)
def test_rewards_of_a_completion(text: str, correct: float, form: float) -> None:
    correct_reward, format_reward = rewards.make_rewards("####")
    turns = [[{"role": "assistant", "content": text}]]
    assert correct_reward(completions=turns, reference=["12"], prompts=None) == [correct]
    assert format_reward(completions=turns, reference=["12"], prompts=None) == [form]


def test_marker_is_the_one_given() -> None:
    correct_reward, _ = rewards.make_rewards("ANSWER:")
    assert correct_reward(completions=["ANSWER: 12", "#### 12"], reference=["12", "12"]) == [1.0, 0.0]


def test_reward_names_are_those_of_the_metrics() -> None:
    """TRL logs `rewards/<name>/mean`, which the report reads."""
    assert [reward.__name__ for reward in rewards.make_rewards("####")] == ["correct_reward", "format_reward"]


def test_math_verify_works_outside_the_main_thread() -> None:
    """Its time limit is a signal, which only the main thread can receive: without our check it raises here."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(rewards.math_verify_equal, "12", "12 pears").result() is True


def test_equal_rewards_of_a_group_have_a_standard_deviation_of_zero() -> None:
    """TRL recognises a group without signal by this; a format weight of 0.2 fails it."""
    values = (0.0, 0.5, 1.0)
    for correct, form in itertools.product(values, values):
        group = torch.full((8,), 1.0 * correct + 0.25 * form)
        assert group.std().item() == 0.0
