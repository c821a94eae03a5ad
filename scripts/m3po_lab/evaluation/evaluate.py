# SPDX-License-Identifier: Apache-2.0
"""Evaluation by lm-eval: the tasks of `configs/eval`, run by its `evaluate` on its `HFLM` with a model in memory.

The report of a training run and `scripts/eval_gsm8k.sh` both go through `run_tasks`, so they build prompts, decode and
score alike. Decoding is single-path and greedy, plain in the modes none and m3po (M3PO paper, section 6) and with soft
thoughts in hrpo and h3po (`Thoughts`), unless `Paths` asks for N sampled completions of each problem. ASLR is off
unless `LatentPaths` asks for it.

`evaluate` rather than `simple_evaluate`, its wrapper: that one seeds the global random generators, which would change
a training that goes on afterwards, and spends seconds on a description of the machine (torch's collect_env).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from m3po_lab.core.errors import PROJECT_ROOT, UserError
from m3po_lab.core.files import read_json, write_json
from m3po_lab.core.observe import unchanged, unchanged_random_state
from m3po_lab.evaluation.decoding import Decoding, Paths, Thoughts
from m3po_lab.evaluation.folder import FinishedParts
from m3po_lab.evaluation.model import EvaluatedModel
from m3po_lab.evaluation.settings import EvalSettings
from m3po_lab.problems.data import Message
from m3po_lab.problems.data_sources import Problem
from m3po_lab.problems.rewards import answer_line

TASK_FOLDER = PROJECT_ROOT / "configs" / "eval"


@dataclass(frozen=True)
class Answered:
    """A held-out problem's completion and its verdicts."""

    completion: str
    correct: bool
    formatted: bool


@dataclass(frozen=True)
class Sampled:
    """N sampled completions of a held-out problem.

    Args:
        accuracy: share of the completions that are right.
        pass_at_n: 1 if one is.
        majority_vote: see `scores.vote`.
        distinct_answers: different answer lines.
        completions: the texts.
    """

    accuracy: float
    pass_at_n: float
    majority_vote: float
    distinct_answers: int
    completions: list[str]


def load_task(name: str, **metadata: Any) -> Task:
    """A task of `configs/eval` by name, with values for the function that makes its documents.

    Raises:
        UserError: from that function, for a dataset that is missing or wrong.
    """
    return TaskManager(include_path=TASK_FOLDER, include_defaults=False, metadata=metadata).load([name])["tasks"][name]


def problems_task(settings: EvalSettings) -> Task:
    """The task of a run's held-out problems, asked as the run asks them."""
    task = load_task("problems", settings=asdict(settings))
    task.set_config("num_fewshot", 0 if settings.worked_example is None else 1)
    task.set_config("generation_kwargs", {"max_gen_toks": settings.max_completion_length}, update=True)
    return task


def run_tasks(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    decoding: Decoding,
    label: str,
    limit: int | None = None,
    finished: FinishedParts | None = None,
) -> dict[str, Any]:
    """lm-eval's results of the tasks, with samples and, under `router`, what ASLR did.

    The model is left as it was (`observe.unchanged`).

    Args:
        model, tokenizer: what is evaluated.
        tasks: those of `load_task`.
        decoding: how the completions are decoded.
        label: text of the progress bar.
        limit: evaluate only the first problems of each task.
        finished: saves the batches that are done.
    """
    with unchanged(model):
        return run_tasks_with(EvaluatedModel(model, tokenizer, decoding, label, finished), tasks, limit)


def run_tasks_with(lm: Any, tasks: Sequence[Task], limit: int | None = None) -> dict[str, Any]:
    """The same with a model of lm-eval's, see `InBatches`."""
    for task in tasks:
        if lm.decoding.paths is not None:
            lm.decoding.paths.configure(task)
        check_length(task, lm)
    results = evaluate(
        lm=lm,
        task_dict={"tasks": {task.task_name: task for task in tasks}},
        limit=limit,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
    )
    return {**results, "router": lm.router}


def check_length(task: Task, lm: Any) -> None:
    """Refuse a model that cannot hold the completions of a task.

    Raises:
        UserError: with both lengths.
    """
    length = task.get_config("generation_kwargs")["max_gen_toks"]
    if length >= lm.max_length:
        raise UserError(
            f"{task.task_name} asks for completions of up to {length} tokens, and the model reads {lm.max_length} in "
            "all; take a model with a longer context."
        )


def answer_problems(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: EvalSettings,
    label: str,
    thoughts: Thoughts | None = None,
) -> list[Answered]:
    """Greedy completions of a run's held-out problems and their verdicts, in the order of the problems."""
    with unchanged_random_state():  # lm-eval draws a task's id from Python's
        task = problems_task(settings)
    decoding = Decoding(settings.batch_size, settings.precision, settings.chat_template_kwargs, thoughts)
    results = run_tasks(model, tokenizer, [task], decoding, label)
    return [
        Answered(sample["resps"][0][0], sample["strict_match"] == 1.0, sample["well_formed"] == 1.0)
        for sample in results["samples"]["problems"]
    ]


def sample_problems(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: EvalSettings,
    label: str,
    paths: Paths,
    limit: int,
) -> list[Sampled]:
    """Sampled completions of the first `limit` held-out problems of a run, in their order, with their verdicts."""
    with unchanged_random_state():
        task = problems_task(settings)
        decoding = Decoding(settings.batch_size, settings.precision, settings.chat_template_kwargs, paths=paths)
        results = run_tasks(model, tokenizer, [task], decoding, label, limit)
    marker = settings.answer_start
    return [
        Sampled(
            accuracy=sample["strict_match"],
            pass_at_n=sample["pass_at_n"],
            majority_vote=sample["majority_vote"],
            distinct_answers=len({answer_line(text, marker) for text in sample["resps"][0]} - {None}),
            completions=list(sample["resps"][0]),
        )
        for sample in results["samples"]["problems"]
    ]


def cache_key(digest: str, prompts: Sequence[list[Message]], problems: Sequence[Problem], settings: object) -> str:
    """A digest of everything that an evaluation's result depends on: the model (`model_digest`), the task files."""
    files = {file.name: file.read_text(encoding="utf-8") for file in sorted(TASK_FOLDER.glob("*.yaml"))}
    content = [digest, list(prompts), [problem.answer for problem in problems], settings, files]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def load_cached(file: Path, key: str) -> list[Answered]:
    """The evaluation stored in `file`; empty if there is none or it has another key."""
    stored = read_json(file)
    if stored is None or stored.get("key") != key:
        return []
    return [Answered(**row) for row in stored["answered"]]


def store(file: Path, key: str, answered: Sequence[Answered]) -> None:
    """Keep an evaluation for a resumed run."""
    write_json(file, {"key": key, "answered": [asdict(row) for row in answered]})
