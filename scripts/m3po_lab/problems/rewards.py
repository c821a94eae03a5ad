# SPDX-License-Identifier: Apache-2.0
"""The two rewards of a run.

`correct_reward` is the paper's: 1 when the completion has exactly one answer marker and what stands behind it equals
the reference, compared as its kind of answer is (`answers.KINDS`). `format_reward` is for small models that do not yet
answer in this form. Both read the *answer line*: the text behind the only marker, which must be one line and not empty,
so that a completion that rambles on behind its answer has neither. Values are dyadic (0, 0.5, 1): the standard
deviation of a group with equal rewards is then exactly 0, which TRL tests for.
"""

from collections.abc import Callable
from typing import Any

from m3po_lab.problems.answers import KINDS

Completion = str | list[dict[str, str]]
Reward = Callable[..., list[float]]


def text_of(completion: Completion) -> str:
    """The text of a completion, which TRL hands over as chat turns when the prompt is one."""
    return completion if isinstance(completion, str) else "".join(turn["content"] for turn in completion)


def answer_line(text: str, marker: str) -> str | None:
    """What stands behind the only `marker`; None for no marker or several, for nothing or several lines behind it."""
    before_and_behind = text.split(marker)
    if len(before_and_behind) != 2:
        return None
    line = before_and_behind[1].strip()
    return line if line and "\n" not in line else None


def is_correct(text: str, reference: str, marker: str, kind: str) -> bool:
    """Exactly one marker, and the line behind it equals the reference."""
    line = answer_line(text, marker)
    return line is not None and KINDS[kind].equal(reference, line)


def is_formatted(text: str, marker: str, kind: str) -> bool:
    """Exactly one marker, and one line behind it in which an answer of the kind can be read, right or wrong."""
    line = answer_line(text, marker)
    return line is not None and KINDS[kind].readable(line)


def make_rewards(marker: str) -> list[Reward]:
    """`correct_reward` and `format_reward` for an answer marker, as TRL calls reward functions."""

    def correct_reward(
        completions: list[Completion], reference: list[str], kind: list[str], **columns: Any
    ) -> list[float]:
        """1.0 for a correct answer behind exactly one marker, else 0.0."""
        return [
            float(is_correct(text_of(completion), answer, marker, of_kind))
            for completion, answer, of_kind in zip(completions, reference, kind, strict=True)
        ]

    def format_reward(completions: list[Completion], kind: list[str], **columns: Any) -> list[float]:
        """0.5 for exactly one marker, 1.0 if there also is one readable answer line behind it, else 0.0."""
        texts = [text_of(completion) for completion in completions]
        return [
            0.5 * (text.count(marker) == 1) + 0.5 * is_formatted(text, marker, of_kind)
            for text, of_kind in zip(texts, kind, strict=True)
        ]

    return [correct_reward, format_reward]
