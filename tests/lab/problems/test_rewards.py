# SPDX-License-Identifier: Apache-2.0
"""Rewards: form and correctness are judged as the docstrings say, whatever the kind of answer."""

import itertools

import pytest
import torch

from m3po_lab.problems import rewards


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
    columns = {"reference": ["12"], "kind": ["number"], "prompts": None}
    assert correct_reward(completions=turns, **columns) == [correct]
    assert format_reward(completions=turns, **columns) == [form]


@pytest.mark.parametrize(
    ("kind", "reference", "right", "wrong", "unreadable"),
    [
        ("letter", "B", "(B) the forces", "C", "12"),
        ("formula", "\\frac{1}{2}", "\\frac12", "\\frac{1}{3}", "\\"),
    ],
)
def test_rewards_compare_as_the_kind_of_answer_is(
    kind: str, reference: str, right: str, wrong: str, unreadable: str
) -> None:
    """As numbers, both halves of this test fail: a letter is none, and of a formula only a digit is seen."""
    correct_reward, format_reward = rewards.make_rewards("####")
    texts = [f"so\n#### {answer}" for answer in (right, wrong, unreadable)]
    assert correct_reward(completions=texts, reference=[reference] * 3, kind=[kind] * 3) == [1.0, 0.0, 0.0]
    assert format_reward(completions=texts, reference=[reference] * 3, kind=[kind] * 3) == [1.0, 1.0, 0.5]


def test_marker_is_the_one_given() -> None:
    correct_reward, _ = rewards.make_rewards("ANSWER:")
    columns = {"reference": ["12", "12"], "kind": ["number", "number"]}
    assert correct_reward(completions=["ANSWER: 12", "#### 12"], **columns) == [1.0, 0.0]


def test_reward_names_are_those_of_the_metrics() -> None:
    """TRL logs `rewards/<name>/mean`, which the report reads."""
    assert [reward.__name__ for reward in rewards.make_rewards("####")] == ["correct_reward", "format_reward"]


def test_equal_rewards_of_a_group_have_a_standard_deviation_of_zero() -> None:
    """TRL recognises a group without signal by this; a format weight of 0.2 fails it."""
    values = (0.0, 0.5, 1.0)
    for correct, form in itertools.product(values, values):
        group = torch.full((8,), 1.0 * correct + 0.25 * form)
        assert group.std().item() == 0.0
