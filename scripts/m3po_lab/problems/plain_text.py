# SPDX-License-Identifier: Apache-2.0
"""Problems as plain text, for a model that continues text and has no chat template."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from typing import Any

from m3po_lab.problems.arguments import DataArguments
from m3po_lab.problems.data import generated_streams
from m3po_lab.problems.data_sources import Problem

QUESTION = "Question: {question}\nAnswer:"
ANSWER = " {answer}\n"
END = "\n"  # of an answer
WITHOUT_END = 10**8  # problems, more than any text holds


def question_text(problem: Problem) -> str:
    """What the model reads."""
    return QUESTION.format(question=problem.question)


def answer_text(problem: Problem) -> str:
    """What it ought to write."""
    return ANSWER.format(answer=problem.answer)


def solved_problems(dataset: str, options: dict[str, Any] | None, every: int) -> Iterator[str]:
    """Documents without end, each a solved problem of a reasoning-gym task.

    Those at the places 0, `every`, 2 `every`, ... are the problems that a run with the same options holds out by
    default (`DataArguments`), over and over; no other document asks one of them.
    """
    held_out, others = generated_streams(DataArguments(dataset=dataset, dataset_config=options), WITHOUT_END)
    apart = cycle(held_out)
    while True:
        yield _solved(next(apart))
        for _ in range(every - 1):
            yield _solved(next(others))


def _solved(problem: Problem) -> str:
    return question_text(problem) + answer_text(problem)
