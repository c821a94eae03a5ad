# SPDX-License-Identifier: Apache-2.0
"""Greedy accuracy on the held-out problems, for the report of a run.

Plain decoding in every mode: what a mode does at training time is not on here. Greedy decoding draws nothing from a
random generator, so an evaluation before training changes nothing about the run.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from m3po_lab.data import Message, Problem
from m3po_lab.files import read_json, write_json
from m3po_lab.rewards import is_correct, is_formatted


@dataclass(frozen=True)
class Answered:
    """A held-out problem's completion and its verdicts."""

    completion: str
    correct: bool
    formatted: bool


@torch.no_grad()
def greedy_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[Message]],
    *,
    max_new_tokens: int,
    batch_size: int,
    label: str,
    autocast: AbstractContextManager[object] | None = None,
) -> list[str]:
    """Complete chat prompts greedily, in batches of similar length, with a progress bar.

    Args:
        prompts: chat turns, completed by an assistant turn.
        max_new_tokens: tokens after which a completion is cut.
        label: text of the progress bar.
        autocast: the precision context of the training, so that both see the same numbers.

    Returns:
        one text per prompt, in their order, without special tokens.
    """
    texts = [tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) for prompt in prompts]
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    decoding = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted({tokenizer.eos_token_id, *ends}),
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    completions = [""] * len(texts)
    was_training = model.training
    model.eval()
    with tqdm(total=len(texts), desc=label, unit="problem", dynamic_ncols=True) as bar, autocast or nullcontext():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = tokenizer(
                [texts[row] for row in rows], return_tensors="pt", padding=True, add_special_tokens=False
            ).to(model.device)
            ids = model.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], generation_config=decoding
            )
            decoded = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for row, text in zip(rows, decoded, strict=True):
                completions[row] = text
            bar.update(len(rows))
    model.train(was_training)
    return completions


def judge(problems: Sequence[Problem], completions: Sequence[str], marker: str) -> list[Answered]:
    """Verdicts on completions, by the rules of the rewards."""
    return [
        Answered(text, is_correct(text, problem.answer, marker), is_formatted(text, marker))
        for problem, text in zip(problems, completions, strict=True)
    ]


def cache_key(model_name: str, prompts: Sequence[list[Message]], problems: Sequence[Problem], settings: object) -> str:
    """A digest of everything that an evaluation's result depends on."""
    content = [model_name, list(prompts), [problem.answer for problem in problems], settings]
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
