# SPDX-License-Identifier: Apache-2.0
"""The two rewards of a run.

`correct_reward` is the paper's: 1 when the completion has exactly one answer marker and what stands behind it equals
the reference, compared by math-verify. `format_reward` is for small models that do not yet answer in this form. Both
read the *answer line*: the text behind the only marker, which must be one line and not empty, so that a completion that
rambles on behind its answer has neither. Values are dyadic (0, 0.5, 1): the standard deviation of a group with equal
rewards is then exactly 0, which TRL tests for.
"""

import logging
import re
import threading
from collections.abc import Callable
from decimal import Decimal
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

PLAIN_NUMBER = re.compile(r"-?(0|[1-9]\d{0,8})(\.\d{1,4})?")  # well within the digits math-verify compares
SECONDS_PER_ANSWER = 2  # math-verify interrupts itself by a signal after this; possible in the main thread only

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


@lru_cache(maxsize=65536)
def answers_equal(reference: str, answer: str) -> bool:
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


def is_correct(text: str, reference: str, marker: str) -> bool:
    """Exactly one marker, and the line behind it equals the reference."""
    line = answer_line(text, marker)
    return line is not None and answers_equal(reference, line)


def is_formatted(text: str, marker: str) -> bool:
    """Exactly one marker, and one line behind it in which math-verify finds an answer, right or wrong."""
    line = answer_line(text, marker)
    return line is not None and is_comparable(line)


def make_rewards(marker: str) -> list[Reward]:
    """`correct_reward` and `format_reward` for an answer marker, as TRL calls reward functions."""

    def correct_reward(completions: list[Completion], reference: list[str], **columns: Any) -> list[float]:
        """1.0 for a correct answer behind exactly one marker, else 0.0."""
        return [
            float(is_correct(text_of(completion), answer, marker))
            for completion, answer in zip(completions, reference, strict=True)
        ]

    def format_reward(completions: list[Completion], **columns: Any) -> list[float]:
        """0.5 for exactly one marker, 1.0 if there also is one readable answer line behind it, else 0.0."""
        texts = [text_of(completion) for completion in completions]
        return [0.5 * (text.count(marker) == 1) + 0.5 * is_formatted(text, marker) for text in texts]

    return [correct_reward, format_reward]


def _parse(answer: str) -> list[Any]:
    return parse(answer, parsing_timeout=_seconds())


def _seconds() -> int | None:
    """Math-verify's time limit; None (no limit) outside the main thread, where its signal cannot be delivered."""
    if threading.current_thread() is threading.main_thread():
        return SECONDS_PER_ANSWER
    for name in ("math_verify.parser", "math_verify.grader", "math_verify.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)  # it warns about the missing limit at every call
    return None
