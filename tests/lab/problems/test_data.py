# SPDX-License-Identifier: Apache-2.0
"""Problems: repeatable, held-out ones distinct and never trained on; whatever is missing is one clear line."""

import json
from pathlib import Path

import pytest

from m3po_lab.core.errors import UserError
from m3po_lab.problems import data
from m3po_lab.problems.arguments import ProblemArguments
from m3po_lab.problems.data_sources import Problem

ADDITION = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def jsonl(folder: Path, count: int) -> Path:
    file = folder / "problems.jsonl"
    rows = [{"question": f"How many is {n}?", "answer": f"It is {n}.\n#### {n:,}"} for n in range(1000, 1000 + count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def generated(**changes: object) -> ProblemArguments:
    defaults = {"dataset_config": dict(ADDITION), "num_train_problems": 300, "num_eval_problems": 40}
    return ProblemArguments(**{**defaults, **changes})


def test_held_out_problems_are_distinct_and_not_trained_on() -> None:
    """One-digit sums repeat quickly, so without the exclusion most of the forty would be in the training set."""
    train, held_out = data.load_problems(generated())
    assert (len(train), len(held_out)) == (300, 40)
    assert len({problem.question for problem in held_out}) == 40
    assert {problem.question for problem in train}.isdisjoint({problem.question for problem in held_out})


def test_same_seeds_give_the_same_problems_and_other_seeds_others() -> None:
    first, again, other = (data.load_problems(generated(eval_seed=seed)) for seed in (5, 5, 6))
    assert first == again
    assert first[1] != other[1]


def test_jsonl_in_the_form_of_gsm8k_is_split_without_overlap(tmp_path: Path) -> None:
    script = ProblemArguments(dataset=str(jsonl(tmp_path, 30)), num_eval_problems=10, num_train_problems=100)
    train, held_out = data.load_problems(script)
    assert (len(train), len(held_out)) == (20, 10)
    assert {problem.answer for problem in train + held_out} == {str(n) for n in range(1000, 1030)}


def test_training_rows_of_a_longer_run_begin_with_those_of_a_shorter_one() -> None:
    """A run that is continued with more steps must go on with the rows it would have seen."""
    train, _ = data.load_problems(generated(num_train_problems=10))
    short, long = (data.training_rows(train, generated(), count)["prompt"] for count in (15, 40))
    assert list(long)[:15] == list(short)
    assert list(long)[:10] != list(long)[10:20]
    assert sorted(str(row) for row in list(long)[:10]) == sorted(str(row) for row in list(long)[10:20])


def test_prompt_has_system_turn_worked_example_and_filled_template_in_this_order() -> None:
    script = generated(
        system_prompt="Be brief.", worked_example={"question": "1 + 1?", "answer": "#### 2"}, prompt_template="<{a}>"
    )
    turns = data.chat_prompt(Problem("q", "4", {"a": "3 + 1"}), script)
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user"]
    assert [turn["content"] for turn in turns] == ["Be brief.", "1 + 1?", "#### 2", "<3 + 1>"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"dataset": "reasoning-gym:no_such_task"}, "no_such_task.*not registered"),
        ({"dataset_config": {"wrong": 1}}, "unexpected keyword argument 'wrong'"),
        ({"dataset_config": {"min_terms": 0}}, "min_terms must be positive"),
        ({"dataset": "nowhere.jsonl", "dataset_config": None}, "nowhere.jsonl does not exist"),
        ({"dataset": "squad", "dataset_config": None}, "--dataset squad is unknown.*openai/gsm8k.*, mmlu_arc"),
        ({"dataset": "openai/gsm8k"}, "--dataset_config only applies to reasoning-gym"),
        ({"num_eval_problems": 500}, "yields only .* distinct questions"),
        ({"worked_example": "{question: x}"}, "just 'question' and 'answer'"),
        ({"dataset": "reasoning-gym:word_ladder", "dataset_config": {}}, "training problem 1 .*must be one number"),
        ({"dataset": "reasoning-gym:time_intervals", "dataset_config": {}}, "problem .*must be one number"),
    ],
)
def test_wrong_dataset_is_one_clear_line(changes: dict[str, object], text: str) -> None:
    with pytest.raises(UserError, match=text) as raised:
        data.load_problems(generated(**changes))
    assert "\n" not in str(raised.value)


def test_every_question_held_out_is_refused() -> None:
    """The 1-digit sums and differences number 200: holding all out leaves nothing to train on."""
    with pytest.raises(UserError, match="nearly every question"):
        data.load_problems(generated(num_eval_problems=200))


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{nope}", "{nope} is no field"),
        ("{question} in {braces}", "{braces} is no field"),
        ("{question} {}", "{} is no field"),
        ("{question} {0}", "{0} is no field"),
        ("{question} Answer as \\boxed{}.", "{} is no field"),
        ("{question.__class__}", "{question.__class__} is no field"),
        ("{question[0]}", "{question[0]} is no field"),
        ("{question:{nope}}", "{nope} is no field"),
        ("{question:d}", "Unknown format code 'd'"),
        ("{question!x}", "x"),
        ("{question", "expected '}' before end of string"),
        ("{question} }", "Single '}' encountered in format string"),
        ("Add them.", "it names no field, which would make all prompts the same"),
        ("{{question}}", "it names no field"),
    ],
)
def test_a_template_that_cannot_be_filled_in_says_why_and_how_braces_are_written(template: str, why: str) -> None:
    with pytest.raises(UserError) as raised:
        data.chat_prompt(Problem("q", "4"), generated(prompt_template=template))
    line = str(raised.value)
    assert f"--prompt_template {template!r} cannot be filled in: " in line and why in line and "\n" not in line
    assert line.endswith("The fields of these problems are question; other braces are doubled: {{ and }}.")


def test_doubled_braces_and_formats_are_taken() -> None:
    script = generated(prompt_template="{question!s:>3} in \\boxed{{}} of {width:03d}")
    assert data.user_turn(Problem("q", "4", {"width": 7}), script) == "  q in \\boxed{} of 007"
