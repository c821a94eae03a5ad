# SPDX-License-Identifier: Apache-2.0
"""Word sums: the answer is what the sentences say, read again from the text."""

import re

import pytest

from m3po_lab.core.errors import UserError
from m3po_lab.problems.arguments import ProblemArguments
from m3po_lab.problems.data import load_problems
from m3po_lab.problems.data_sources import Problem

LESS = re.compile(r"gives \d+ \w+ away|loses|sells")


def problems(number: int = 200, **options: object) -> list[Problem]:
    arguments = ProblemArguments(
        dataset="reasoning-gym:word_sums", dataset_config=options, num_train_problems=number, num_eval_problems=20
    )
    return load_problems(arguments)[0]


@pytest.mark.parametrize(("changes", "losses", "most"), [(1, False, 9), (2, False, 9), (3, True, 5)])
def test_the_answer_is_what_the_sentences_say(changes: int, losses: bool, most: int) -> None:
    found = problems(changes=changes, losses=losses, max_number=most)
    for problem in found:
        first, *sentences, question = problem.question.split(". ")
        total = int(re.findall(r"\d+", first)[0])
        assert len(sentences) == changes and question.startswith("How many")
        for sentence in sentences:
            (number,) = map(int, re.findall(r"\d+", sentence))
            assert 1 <= number <= most
            total += -number if LESS.search(sentence) else number
            assert total >= 0
        assert problem.answer == str(total) == str(eval(problem.fields["expression"]))  # noqa: S307 - our own text
    assert any(LESS.search(problem.question) for problem in found) == losses


def test_no_sentence_follows_its_like() -> None:
    for problem in problems(changes=4):
        plain = [re.sub(r"\d+", "", sentence) for sentence in problem.question.split(". ")[1:-1]]
        assert all(one != other for one, other in zip(plain, plain[1:], strict=False))


@pytest.mark.parametrize("options", [{"changes": 0}, {"max_number": 0}, {"colour": "red"}])
def test_options_that_make_no_problem_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(UserError, match="word_sums"):
        problems(**options)
