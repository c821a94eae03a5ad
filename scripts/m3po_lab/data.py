# SPDX-License-Identifier: Apache-2.0
"""Problems with one checkable answer, split into training and held-out, and the prompts made of them.

Sources: a task of reasoning-gym by name, `openai/gsm8k`, or a local JSONL in GSM8K's format. Held-out questions are
distinct and never in the training set. For GSM8K they come from its *train* split too: its test split stays untouched
for the final evaluation.
"""

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import reasoning_gym
from datasets import Dataset, load_dataset

from m3po_lab.config import RunArguments, UserError, one_line
from m3po_lab.rewards import is_comparable

GYM_PREFIX = "reasoning-gym:"
GSM8K = "openai/gsm8k"
TRIES_PER_PROBLEM = 50  # generated problems looked at for one new problem before giving up

Message = dict[str, str]


@dataclass(frozen=True)
class Problem:
    """A question, its reference answer as math-verify reads it, and the fields a prompt template may name."""

    question: str
    answer: str
    fields: dict[str, Any] = field(default_factory=dict, compare=False)


def load_problems(script: RunArguments) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out problems of a run; the same arguments give the same lists.

    Raises:
        UserError: when the dataset is missing, unreadable or too small, or math-verify cannot compare an answer.
    """
    if script.dataset.startswith(GYM_PREFIX):
        train, held_out = _generated(script)
    elif script.dataset_config is not None:
        raise UserError(f"--dataset_config only applies to reasoning-gym tasks, not to --dataset {script.dataset}.")
    elif script.dataset == GSM8K:
        train, held_out = _split(_hub_gsm8k(), script)
    elif script.dataset.endswith(".jsonl"):
        train, held_out = _split(read_jsonl(Path(script.dataset)), script)
    else:
        raise UserError(
            f"--dataset {script.dataset} is unknown: give 'reasoning-gym:<task>', '{GSM8K}' or the path of a .jsonl."
        )
    for problem in held_out:
        if not is_comparable(problem.answer):
            raise UserError(
                f"--dataset {script.dataset}: math-verify cannot read the answer {problem.answer!r}; "
                "choose a dataset whose answers are numbers or formulas."
            )
    return train, held_out


def read_jsonl(path: Path) -> list[Problem]:
    """Problems from a file with one JSON object a line, `question` and `answer` ending in ``#### <number>``.

    Raises:
        UserError: when the file is missing or a line does not have this form; the line is named.
    """
    return [gsm8k_problem(row["question"], row["answer"]) for row in jsonl_rows(path)]


def jsonl_rows(path: Path) -> list[dict[str, str]]:
    """The rows of such a file, each checked; the same errors."""
    if not path.is_file():
        raise UserError(f"--dataset {path} does not exist: give the path of a .jsonl file in GSM8K's format.")
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                gsm8k_problem(row["question"], row["answer"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{path}, line {number}: each line must be a JSON object with the texts 'question' and 'answer', "
                    "the answer ending in '#### <number>'."
                ) from error
            rows.append(row)
    return rows


def gsm8k_problem(question: str, answer: str) -> Problem:
    """A GSM8K row as a problem: the reference is what follows the last ``####``, thousands separators removed.

    Raises:
        ValueError: when the answer has no ``####`` or nothing behind it.
    """
    _, marker, reference = answer.rpartition("####")
    reference = reference.strip().replace(",", "")
    if not marker or not reference:
        raise ValueError("no '#### <number>' in the answer")
    return Problem(question.strip(), reference)


def chat_prompt(problem: Problem, script: RunArguments) -> list[Message]:
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


def user_turn(problem: Problem, script: RunArguments) -> str:
    """The template of the run filled in with a problem; the same error."""
    fields = {**problem.fields, "question": problem.question}
    try:
        return script.prompt_template.format(**fields)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"--prompt_template {script.prompt_template!r} cannot be filled in ({one_line(error)}); "
            f"the fields of these problems are {', '.join(sorted(fields))}."
        ) from error


def training_rows(problems: list[Problem], script: RunArguments, count: int) -> Dataset:
    """`count` rows (`prompt`, `reference`) in the order they are trained on, each pass over the problems reshuffled.

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
    return Dataset.from_list([{"prompt": chat_prompt(row, script), "reference": row.answer} for row in rows[:count]])


def _generated(script: RunArguments) -> tuple[list[Problem], list[Problem]]:
    """Problems of a reasoning-gym task, from its two seeds."""
    held_out = _take_new(_gym_stream(script, script.eval_seed, script.num_eval_problems), script.num_eval_problems)
    if len(held_out) < script.num_eval_problems:
        raise UserError(
            f"--num_eval_problems {script.num_eval_problems}: {script.dataset} with this --dataset_config yields only "
            f"{len(held_out)} distinct questions; lower it or widen the task."
        )
    taken = {problem.question for problem in held_out}
    train = []
    for problem in _gym_stream(script, script.problem_seed, script.num_train_problems):
        if problem.question not in taken:
            train.append(problem)
            if len(train) == script.num_train_problems:
                return train, held_out
    raise UserError(
        f"--num_train_problems {script.num_train_problems}: nearly every question of {script.dataset} with this "
        "--dataset_config is held out; lower --num_eval_problems or widen the task."
    )


def _gym_stream(script: RunArguments, seed: int, wanted: int) -> Iterator[Problem]:
    """Problems of the task one after the other, at most `TRIES_PER_PROBLEM` for each one wanted."""
    task = script.dataset.removeprefix(GYM_PREFIX)
    options = script.dataset_config if isinstance(script.dataset_config, dict) else {}
    try:
        entries = reasoning_gym.create_dataset(task, seed=seed, size=wanted * TRIES_PER_PROBLEM, **options)
        for entry in entries:
            values = {key: value for key, value in entry["metadata"].items() if isinstance(value, str | int | float)}
            yield Problem(entry["question"], str(entry["answer"]), values)
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"--dataset {script.dataset} (--dataset_config {options}): {one_line(error)}") from error


def _take_new(problems: Iterable[Problem], count: int) -> list[Problem]:
    """The first `count` problems with different questions (fewer if there are no more)."""
    found: dict[str, Problem] = {}
    for problem in problems:
        found.setdefault(problem.question, problem)
        if len(found) == count:
            break
    return list(found.values())


def _hub_gsm8k() -> list[Problem]:
    """GSM8K's train split from the Hub or its local cache."""
    try:
        rows = load_dataset(GSM8K, "main", split="train")
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--dataset {GSM8K} could not be loaded from the Hub ({one_line(error)[:150]}); without a network, "
            "give a local .jsonl in its format or a reasoning-gym task."
        ) from error
    return [gsm8k_problem(row["question"], row["answer"]) for row in rows]


def _split(problems: list[Problem], script: RunArguments) -> tuple[list[Problem], list[Problem]]:
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
