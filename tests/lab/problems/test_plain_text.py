# SPDX-License-Identifier: Apache-2.0
"""Solved problems as text: held-out ones at their places, and nowhere else; rows of them for a pretraining."""

from itertools import islice

import pytest

from m3po_lab.core.errors import UserError
from m3po_lab.pretraining.arguments import PretrainArguments
from m3po_lab.pretraining.data import byte_tokenizer, load_text
from m3po_lab.problems.arguments import DataArguments
from m3po_lab.problems.data import load_problems
from m3po_lab.problems.plain_text import answer_text, question_text, solved_problems

TASK = "reasoning-gym:basic_arithmetic"
OPTIONS = {
    "min_terms": 2,
    "max_terms": 2,
    "min_digits": 1,
    "max_digits": 2,
    "operators": ["+"],
    "allow_parentheses": False,
    "allow_negation": False,
}


def test_held_out_problems_are_at_their_places_and_in_no_other_document():
    _, held_out = load_problems(DataArguments(dataset=TASK, dataset_config=OPTIONS, num_train_problems=1))
    texts = list(islice(solved_problems(TASK, OPTIONS, 3), 1500))
    apart = texts[::3]
    assert apart[:400] == [question_text(one) + answer_text(one) for one in held_out] and apart[400:] == apart[:100]
    assert not set(apart) & {text for place, text in enumerate(texts) if place % 3}
    assert texts == list(islice(solved_problems(TASK, OPTIONS, 3), 1500))
    question, answer = texts[1].split("\n")[:2]
    one, other = question.removeprefix("Question: Calculate ").removesuffix(".").split(" + ")
    assert int(answer.removeprefix("Answer: ")) == int(one) + int(other) and texts[1].endswith("\n")


def test_rows_of_a_pretraining_are_such_documents():
    tokenizer = byte_tokenizer()
    training, held_out = load_text(TASK, OPTIONS, tokenizer, 128, 4, 50)
    assert (len(training), len(held_out)) == (50, 4)
    written = ["".join(tokenizer.batch_decode(part.rows)).split("<|bos|>") for part in (training, held_out)]
    asked, tested = ({text for text in texts if text.endswith("\n")} for texts in written)
    assert len(asked) > 100 and len(tested) > 10 and not asked & tested


def test_options_are_a_mapping_for_generated_text_only():
    assert PretrainArguments(dataset=TASK, dataset_config='{"max_terms": 2}').dataset_config == {"max_terms": 2}
    assert PretrainArguments(dataset="a/b", dataset_config="en").dataset_config == "en"
    with pytest.raises(UserError, match="--dataset_config = 'en': it must be a mapping"):
        PretrainArguments(dataset=TASK, dataset_config="en")
    with pytest.raises(UserError, match="of a/b it is a name, not a mapping"):
        PretrainArguments(dataset="a/b", dataset_config={"max_terms": 2})
    with pytest.raises(UserError, match="reasoning-gym:nothing"):
        load_text("reasoning-gym:nothing", None, byte_tokenizer(), 128, 4, 50)
