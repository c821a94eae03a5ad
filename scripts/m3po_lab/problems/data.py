# SPDX-License-Identifier: Apache-2.0
"""Problems of a run, split into training and held-out, and the prompts made of them.

Sources: a task of reasoning-gym by name, a dataset of the Hub or a local JSONL (`data_sources`). Held-out questions are
distinct and never in the training set. For the Hub's datasets they come from the *train* split too: the test splits
stay untouched for the final evaluation.
"""

import random
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from string import Formatter
from typing import Any

import reasoning_gym
from datasets import Dataset

from m3po_lab.core.errors import UserError, one_line
from m3po_lab.problems import word_sums
from m3po_lab.problems.arguments import DataArguments, ProblemArguments
from m3po_lab.problems.data_sources import HUB_PROBLEMS, Problem, check_references, read_jsonl

GYM_PREFIX = "reasoning-gym:"
TRIES_PER_PROBLEM = 50  # generated problems looked at for one new problem before giving up

Message = dict[str, str]


def load_problems(script: DataArguments) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out problems of a run; the same arguments give the same lists.

    Raises:
        UserError: when the dataset is missing, unreadable or too small, or a reference cannot be compared with answers.
    """
    if script.dataset.startswith(GYM_PREFIX):
        train, held_out = _generated(script)
    elif script.dataset_config is not None:
        raise UserError(f"--dataset_config only applies to reasoning-gym tasks, not to --dataset {script.dataset}.")
    elif script.dataset in HUB_PROBLEMS:
        train, held_out = _split(HUB_PROBLEMS[script.dataset](), script)
    elif script.dataset.endswith(".jsonl"):
        train, held_out = _split(read_jsonl(Path(script.dataset)), script)
    else:
        raise UserError(
            f"--dataset {script.dataset} is unknown: give 'reasoning-gym:<task>', the path of a .jsonl, or one of "
            f"{', '.join(HUB_PROBLEMS)}."
        )
    check_references(script.dataset, {"training": train, "held-out": held_out})
    return train, held_out


def chat_prompt(problem: Problem, script: ProblemArguments) -> list[Message]:
    """The chat turns of one problem: system turn, worked example, question; each only if configured.

    Raises:
        UserError: when the template names a field that the problem does not have.
    """
    turns = []
    if script.system_prompt:
        turns.append({"role": "system", "content": script.system_prompt})
    if isinstance(script.worked_example, dict):
        turns.append({"role": "user", "content": script.worked_example["question"]})
        turns.append({"role": "assistant", "content": script.worked_example["answer"]})
    turns.append({"role": "user", "content": user_turn(problem, script)})
    return turns


def user_turn(problem: Problem, script: ProblemArguments) -> str:
    """The template of the run filled in with a problem; the error of `chat_prompt`."""
    fields = {**problem.fields, "question": problem.question}
    try:
        check_template(script.prompt_template, fields)
        return script.prompt_template.format(**fields)
    except ValueError as error:
        raise UserError(
            f"--prompt_template {script.prompt_template!r} cannot be filled in: {one_line(error)}. The fields of these "
            f"problems are {', '.join(sorted(fields))}; other braces are doubled: {{{{ and }}}}."
        ) from error


def check_template(template: str, fields: Mapping[str, Any]) -> None:
    """Refuse a template that names what is no field, looks into one, or names none.

    Raises:
        ValueError: says what.
    """
    names = list(_names(template))
    for name in names:
        if name not in fields:
            raise ValueError(f"{{{name}}} is no field")
    if not names:
        raise ValueError("it names no field, which would make all prompts the same")


def _names(template: str) -> Iterator[str]:
    """What stands in the braces of a template, those within a format included."""
    for _, name, form, _ in Formatter().parse(template):
        if name is not None:
            yield name
            yield from _names(form or "")


def training_rows(problems: list[Problem], script: ProblemArguments, count: int) -> Dataset:
    """`count` rows (`prompt`, `reference`, `kind`) in the order they are trained on, each pass over them reshuffled.

    The order is made here and not by TRL's sampler, which starts its permutation anew when a run resumes in a later
    epoch; and since it depends on the seed alone, a longer run begins with the rows of a shorter one.
    """
    rows: list[Problem] = []
    epoch = 0
    while len(rows) < count:
        order = list(problems)
        random.Random(f"{script.problem_seed}-{epoch}").shuffle(order)
        rows += order
        epoch += 1
    return Dataset.from_list(
        [{"prompt": chat_prompt(row, script), "reference": row.answer, "kind": row.kind} for row in rows[:count]]
    )


def _generated(script: DataArguments) -> tuple[list[Problem], list[Problem]]:
    """Problems of a reasoning-gym task, from its two seeds."""
    held_out, others = generated_streams(script, script.num_train_problems)
    train = list(islice(others, script.num_train_problems))
    if len(train) == script.num_train_problems:
        return train, held_out
    raise UserError(
        f"--num_train_problems {script.num_train_problems}: nearly every question of {script.dataset} with this "
        "--dataset_config is held out; lower --num_eval_problems or widen the task."
    )


def generated_streams(script: DataArguments, count: int) -> tuple[list[Problem], Iterator[Problem]]:
    """The held-out problems of a reasoning-gym task, and others one after the other, about `count` or more.

    Raises:
        UserError: there are not as many to hold out; while they are read: the task does not exist or refuses its
            options.
    """
    held_out = _take_new(_gym_stream(script, script.eval_seed, script.num_eval_problems), script.num_eval_problems)
    if len(held_out) < script.num_eval_problems:
        raise UserError(
            f"--num_eval_problems {script.num_eval_problems}: {script.dataset} with this --dataset_config yields only "
            f"{len(held_out)} distinct questions; lower it or widen the task."
        )
    questions = {problem.question for problem in held_out}
    stream = _gym_stream(script, script.problem_seed, count)
    return held_out, (problem for problem in stream if problem.question not in questions)


def _gym_stream(script: DataArguments, seed: int, count: int) -> Iterator[Problem]:
    """Problems of the task one after the other, at most `TRIES_PER_PROBLEM` for each one wanted."""
    word_sums.register()
    task = script.dataset.removeprefix(GYM_PREFIX)
    options = script.dataset_config if isinstance(script.dataset_config, dict) else {}
    try:
        entries = reasoning_gym.create_dataset(task, seed=seed, size=count * TRIES_PER_PROBLEM, **options)
        for entry in entries:
            values = {key: value for key, value in entry["metadata"].items() if isinstance(value, str | int | float)}
            yield Problem(entry["question"], str(entry["answer"]), values)
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"--dataset {script.dataset} (--dataset_config {options}): {one_line(error)}") from error


def _take_new(problems: Iterable[Problem], count: int) -> list[Problem]:
    """The first `count` problems with different questions (fewer if there are no more)."""
    distinct: dict[str, Problem] = {}
    for problem in problems:
        distinct.setdefault(problem.question, problem)
        if len(distinct) == count:
            break
    return list(distinct.values())


def _split(problems: list[Problem], script: DataArguments) -> tuple[list[Problem], list[Problem]]:
    """Draw held-out problems by their seed, train on (at most `num_train_problems` of) the rest."""
    distinct = _take_new(problems, len(problems))
    if len(distinct) <= script.num_eval_problems:
        raise UserError(
            f"--num_eval_problems {script.num_eval_problems}: {script.dataset} has {len(distinct)} distinct questions, "
            "which leaves none to train on; lower it."
        )
    random.Random(script.eval_seed).shuffle(distinct)
    held_out, rest = distinct[: script.num_eval_problems], distinct[script.num_eval_problems :]
    random.Random(script.problem_seed).shuffle(rest)
    return rest[: script.num_train_problems], held_out
