# SPDX-License-Identifier: Apache-2.0
"""lm-eval's model class for a model in memory: prompts by its chat template, decoded as a checkpoint decodes.

Of a training in several processes, all take part, in turns of one batch.
"""

import sys
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import jinja2
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.m3po.shared_prefix import model_obstacle, shared_prefill

from m3po_lab.core.errors import UserError, one_line
from m3po_lab.evaluation.decoding import Decoding, router_of_batch, router_statistics
from m3po_lab.evaluation.folder import FinishedParts
from m3po_lab.evaluation.settings import AUTOCAST
from m3po_lab.problems.data import Message


class InBatches:
    """What our models have in common, whatever decodes: prompts, batches, progress, and parts that are done.

    Attributes:
        tokenizer, decoding, label, finished, processes, batch_size: see `EvaluatedModel`.
        router: what ASLR did over all completions, see `router_statistics`.
    """

    tokenizer: Any
    decoding: Decoding
    label: str
    finished: FinishedParts | None
    processes: PartialState
    batch_size: int
    router: dict[str, float]
    router_of_last: dict[str, float]

    def apply_chat_template(self, chat_history: list[Message], add_generation_prompt: bool = True) -> str:
        """The prompt as text. lm-eval's own drops a system turn that the template does not take; this one says so."""
        try:
            return self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **(self.decoding.chat_template_kwargs or {}),
            )
        except jinja2.exceptions.TemplateError as error:
            raise UserError(f"the model's chat template refuses this prompt: {one_line(error)}") from error

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
        batches = []
        for task in dict.fromkeys(request.task_name for request in requests):
            rows = [index for index, request in enumerate(requests) if request.task_name == task]
            rows.sort(key=lambda index: len(requests[index].args[0]))
            batches += [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        return batches

    def _generate_batch(self, number: int, requests: list[Any]) -> dict[str, Any]:
        if self.decoding.paths is not None:
            self.decoding.paths.seed_batch(number)
        self.router_of_last = {}
        batch = {"texts": self.generate_batch(requests), "router": self.router_of_last}
        if self.finished is not None:
            self.finished.add(batch)
        return batch

    @abstractmethod
    def generate_batch(self, requests: list[Any]) -> list[str]:
        """The completions of a batch."""


class EvaluatedModel(InBatches, HFLM):
    """lm-eval's `HFLM` on a model in memory, with our progress bar; see `decoding` for how it decodes.

    Args:
        decoding: how it decodes.
        label: text of the progress bar.
        finished: saves the batches that are done.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        decoding: Decoding,
        label: str,
        finished: FinishedParts | None = None,
    ) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=decoding.rows,
            mixed_precision_dtype=AUTOCAST[decoding.precision],
            add_bos_token=False,  # the chat template has put in what belongs there
        )
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        self.ends = sorted({tokenizer.eos_token_id, *ends})
        self.decoding = decoding
        self.label = label
        self.finished = finished
        self.processes = PartialState()
        self.router = {}

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

    def generate_batch(self, requests: list[Any]) -> list[str]:
        return HFLM.generate_until(self, requests, disable_tqdm=True)

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        """One batch: what a model's own generation config would add to plain decoding is switched off."""
        state = self.decoding.state(context, generation_kwargs["attention_mask"], self.tokenizer)
        generation_kwargs["is_m3po_inference"] = self.decoding.latent_paths is None
        if state is not None:
            generation_kwargs["m3po"] = state
        words = [word for word in stop if word != self.tokenizer.eos_token]  # that one ends a row by its id
        generation_kwargs |= self._shared_prefill(context, generation_kwargs["attention_mask"])
        context = generation_kwargs.pop("input_ids", context)
        rows = super()._model_generate(
            context, max_length, words, eos_token_id=self.ends, repetition_penalty=1.0, **generation_kwargs
        )
        self.router_of_last = {} if self.decoding.latent_paths is None else router_of_batch(state)
        return rows

    def _shared_prefill(self, prompts: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
        """What the prompts (B, L) of a batch begin with, and those of the paths of a problem, are read once."""
        if "unsloth" in sys.modules or model_obstacle(self.model.config) is not None:  # Unsloth's cache is its own
            return {}
        number = 1 if self.decoding.paths is None else self.decoding.paths.number
        number = number if len(prompts) % number == 0 else 1
        with torch.autocast(
            self.device.type, self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
        ):
            alone = self.processes.num_processes == 1
            return shared_prefill(self.model, prompts, mask, number, find_common=alone)
