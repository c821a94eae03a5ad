# SPDX-License-Identifier: Apache-2.0
"""Evaluation by lm-eval: the tasks of `configs/eval`, run by its `evaluate` on its `HFLM` with a model in memory.

The report of a training run and `scripts/eval_gsm8k.sh` both go through `run_tasks`, so they build prompts, decode and
score alike. Of a training in several processes, all take part, in turns of one batch. Decoding is single-path and
greedy, plain in the modes none and m3po (M3PO paper, section 6) and with soft thoughts in hrpo and h3po (`Thoughts`),
unless `Paths` asks for N sampled completions of each problem. ASLR is off unless `LatentPaths` asks for it.

`evaluate` rather than `simple_evaluate`, its wrapper: that one seeds the global random generators, which would change
a training that goes on afterwards, and spends seconds on a description of the machine (torch's collect_env).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.m3po import M3POGenerationState

from m3po_lab.core.errors import PROJECT_ROOT, UserError, one_line
from m3po_lab.core.files import read_json, write_json
from m3po_lab.core.observe import unchanged, unchanged_random_state
from m3po_lab.evaluation.decoding import LatentPaths, Paths, Thoughts
from m3po_lab.evaluation.resume import FinishedParts
from m3po_lab.evaluation.router import router_of_batch, router_statistics
from m3po_lab.evaluation.settings import AUTOCAST, EvalSettings
from m3po_lab.problems.data import Message
from m3po_lab.problems.data_sources import Problem

TASK_FOLDER = PROJECT_ROOT / "configs" / "eval"


@dataclass(frozen=True)
class Answered:
    """A held-out problem's completion and its verdicts."""

    completion: str
    correct: bool
    formatted: bool


class EvaluatedModel(HFLM):
    """lm-eval's `HFLM` on a model in memory, with our progress bar; see `decoding` for how it decodes.

    Args:
        batch_size: rows decoded together, of similar length; with `paths`, rounded to whole groups.
        precision: `no` or the autocast of the training.
        label: text of the progress bar.
        chat_template_kwargs: what the chat template is given besides the turns.
        thoughts: of a greedy path; not looked at with `paths`.
        aslr: makes ASLR run, on a model that has it.
        finished: keeps the batches that are done.

    Attributes:
        router: what ASLR did over all completions, see `router_statistics`.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        precision: str,
        label: str,
        chat_template_kwargs: dict[str, Any] | None = None,
        thoughts: Thoughts | None = None,
        paths: Paths | None = None,
        aslr: LatentPaths | None = None,
        finished: FinishedParts | None = None,
    ) -> None:
        if paths is not None:
            batch_size = max(1, batch_size // paths.number) * paths.number
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            mixed_precision_dtype=AUTOCAST[precision],
            add_bos_token=False,  # the chat template has put in what belongs there
        )
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        self.ends = sorted({tokenizer.eos_token_id, *ends})
        self.label = label
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.thoughts = thoughts
        self.paths = paths
        self.aslr = aslr
        self.finished = finished
        self.processes = PartialState()
        self.router: dict[str, float] = {}
        self._router_of_batch: dict[str, float] = {}

    def apply_chat_template(self, chat_history: list[Message], add_generation_prompt: bool = True) -> str:
        """The prompt as text. lm-eval's own drops a system turn that the template does not take; this one says so."""
        try:
            return self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.chat_template_kwargs,
            )
        except jinja2.exceptions.TemplateError as error:
            raise UserError(f"the model's chat template refuses this prompt: {one_line(error)}") from error

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask (B, L). lm-eval's own cuts a long prompt from the left; this one refuses it."""
        ids, mask = super().tok_batch_encode(strings, padding_side, None, **kwargs)
        if left_truncate_len is not None and ids.shape[1] > left_truncate_len:
            raise UserError(
                f"a prompt has {ids.shape[1]} tokens, and the model reads {self.max_length} with the completion; "
                "take a model with a longer context, or fewer examples."
            )
        return ids, mask

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """lm-eval's generation, one of `batches` a call; those that `finished` has are taken from there."""
        batches = self.batches(requests)
        done = self.finished.read([request.args for request in requests], batches) if self.finished else []
        at = sum(len(batch["texts"]) for batch in done)
        with tqdm(total=len(requests), initial=at, desc=self.label, unit="completion", dynamic_ncols=True) as bar:
            for start in range(len(done), len(batches), self.processes.num_processes):
                # A process without a batch of its own repeats the last one: a model that is split over the processes
                # needs all of them in every step.
                number = min(start + self.processes.process_index, len(batches) - 1)
                batch = self._generate_batch(number, [requests[row] for row in batches[number]])
                done += gather_object([batch])[: len(batches) - start]
                bar.update(sum(len(batch["texts"]) for batch in done[start:]))
        completions = [""] * len(requests)
        for rows, batch in zip(batches, done, strict=True):
            for row, text in zip(rows, batch["texts"], strict=True):
                completions[row] = text
        self.router = router_statistics([batch["router"] for batch in done])
        return completions

    def batches(self, requests: Sequence[Any]) -> list[list[int]]:
        """Requests by position: of one task and of rising prompt length, the paths of a problem side by side.

        Tasks do not share a batch: a bf16 completion can depend on what it is padded with, and a task's results must
        not depend on which others are evaluated beside it.
        """
        found = []
        for task in dict.fromkeys(request.task_name for request in requests):
            rows = [index for index, request in enumerate(requests) if request.task_name == task]
            rows.sort(key=lambda index: len(requests[index].args[0]))
            found += [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        return found

    def _generate_batch(self, number: int, requests: list[Any]) -> dict[str, Any]:
        if self.paths is not None:
            self.paths.seed_batch(number)
        self._router_of_batch = {}
        batch = {"texts": super().generate_until(requests, disable_tqdm=True), "router": self._router_of_batch}
        if self.finished is not None:
            self.finished.add(batch)
        return batch

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        """One batch: what a model's own generation config would add to plain decoding is switched off."""
        state, seeds = None, None
        if self.aslr is not None:
            number = 1 if self.paths is None else self.paths.number
            seeds = self.aslr.row_seeds(context, generation_kwargs["attention_mask"], number)
        if self.paths is not None:
            state = self.paths.state(context, self.tokenizer, seeds)
        elif self.thoughts is not None:
            state = self.thoughts.state(self.tokenizer, seeds)
        elif seeds is not None:
            state = M3POGenerationState(row_seeds=seeds)
        generation_kwargs["is_m3po_inference"] = self.aslr is None
        if state is not None:
            generation_kwargs["m3po"] = state
            state.aslr_overrides = {} if self.aslr is None else self.aslr.overrides
        words = [word for word in stop if word != self.tokenizer.eos_token]  # that one ends a row by its id
        rows = super()._model_generate(
            context, max_length, words, eos_token_id=self.ends, repetition_penalty=1.0, **generation_kwargs
        )
        self._router_of_batch = {} if self.aslr is None else router_of_batch(state)
        return rows


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
    *,
    batch_size: int,
    precision: str,
    label: str,
    chat_template_kwargs: dict[str, Any] | None = None,
    thoughts: Thoughts | None = None,
    paths: Paths | None = None,
    aslr: LatentPaths | None = None,
    limit: int | None = None,
    finished: FinishedParts | None = None,
) -> dict[str, Any]:
    """lm-eval's results of the tasks, with samples and, under `router`, what ASLR did.

    The model is left as it was (`observe.unchanged`).

    Args:
        limit: evaluate only the first problems of each task.
        the others: see `EvaluatedModel`.
    """
    for task in tasks:
        if paths is not None:
            paths.configure(task)
    with unchanged(model):
        lm = EvaluatedModel(
            model,
            tokenizer,
            batch_size=batch_size,
            precision=precision,
            label=label,
            chat_template_kwargs=chat_template_kwargs,
            thoughts=thoughts,
            paths=paths,
            aslr=aslr,
            finished=finished,
        )
        for task in tasks:
            check_length(task, lm)
        results = evaluate(
            lm=lm,
            task_dict={"tasks": {task.task_name: task for task in tasks}},
            limit=limit,
            apply_chat_template=True,
            fewshot_as_multiturn=True,
        )
        return {**results, "router": lm.router}


def check_length(task: Task, lm: EvaluatedModel) -> None:
    """Refuse a model that cannot hold the completions of a task.

    Raises:
        UserError: with both lengths.
    """
    wanted = task.get_config("generation_kwargs")["max_gen_toks"]
    if wanted >= lm.max_length:
        raise UserError(
            f"{task.task_name} asks for completions of up to {wanted} tokens, and the model reads {lm.max_length} in "
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
    results = run_tasks(
        model,
        tokenizer,
        [task],
        batch_size=settings.batch_size,
        precision=settings.precision,
        label=label,
        chat_template_kwargs=settings.chat_template_kwargs,
        thoughts=thoughts,
    )
    return [
        Answered(sample["resps"][0][0], sample["strict_match"] == 1.0, sample["well_formed"] == 1.0)
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
