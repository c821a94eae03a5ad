# SPDX-License-Identifier: Apache-2.0
"""`reasoning-gym:word_sums`: small word problems whose numbers change several times, one step of a solution each.

The paths of a group can go wrong in different steps, so that they have something to tell each other; the numbers are
small enough for a model of 135M parameters. It is registered with reasoning-gym as a task like its own.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reasoning_gym.factory import DATASETS, ProceduralDataset, register_dataset

NAME = "word_sums"
PEOPLE = ("Ann", "Ben", "Eva", "Ida", "Jon", "Lea", "Leo", "Max", "Mia", "Sam", "Tom", "Zoe")
THINGS = ("apples", "balls", "books", "cards", "coins", "eggs", "pens", "plums", "shells", "stamps")
GAINS = (
    "{person} buys {number} more {things}.",
    "{person} finds {number} more {things}.",
    "A friend gives {person} {number} more {things}.",
)
LOSSES = (
    "{person} gives {number} {things} away.",
    "{person} loses {number} {things}.",
    "{person} sells {number} {things}.",
)


@dataclass
class WordSumsConfig:
    """The options of the task.

    Args:
        changes: how often the number changes, the steps of a solution; at least 1.
        losses: whether it may become smaller; never below 0.
        max_number: of what one has at first and of each change; at least 1.
        seed, size: as reasoning-gym's own tasks have them.
    """

    changes: int = 2
    losses: bool = False
    max_number: int = 9
    seed: int | None = None
    size: int = 500

    def validate(self) -> None:
        """Refuses numbers that make no problem."""
        assert self.changes >= 1, "changes must be at least 1"
        assert self.max_number >= 1, "max_number must be at least 1"


class WordSumsDataset(ProceduralDataset):
    """Problems by their index."""

    def __init__(self, config: WordSumsConfig) -> None:
        super().__init__(config=config, seed=config.seed, size=config.size)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        """The problem number `idx`: question, answer and, as metadata, the sum that it amounts to."""
        draw = random.Random(self.seed + idx)
        person, things = draw.choice(PEOPLE), draw.choice(THINGS)
        total = draw.randint(1, self.config.max_number)
        sentences, terms, last = [f"{person} has {total} {things}."], [str(total)], ""
        for _ in range(self.config.changes):
            loses = self.config.losses and total > 0 and draw.random() < 0.5
            number = draw.randint(1, min(total, self.config.max_number) if loses else self.config.max_number)
            last = draw.choice(_other_than(last, LOSSES if loses else GAINS))
            sentences.append(last.format(person=person, number=number, things=things))
            terms.append(f"{'-' if loses else '+'} {number}")
            total += -number if loses else number
        return {
            "question": " ".join([*sentences, f"How many {things} does {person} have now?"]),
            "answer": str(total),
            "metadata": {"source_dataset": NAME, "source_index": idx, "expression": " ".join(terms)},
        }


def _other_than(last: str, sentences: Sequence[str]) -> list[str]:
    """The sentences without the last one that was taken."""
    return [sentence for sentence in sentences if sentence != last]


def register() -> None:
    """Makes the task known to reasoning-gym."""
    if NAME not in DATASETS:
        register_dataset(NAME, WordSumsDataset, WordSumsConfig)
