# SPDX-License-Identifier: Apache-2.0
"""What the tests of vLLM share: prompts, `generate` and an engine that draw with the same random numbers."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import m3po_vllm
import torch
from m3po_vllm.requests import GROUP, PATH, PATHS, RECORD, Tag
from m3po_vllm.sampler import Sampler
from m3po_vllm.worker import Worker
from reference.families import build
from reference.gated import STRONG
from reference.tiny import small_tokenizer
from transformers.m3po import M3POGenerationState
from transformers.m3po.settings import ThinkingSettings
from transformers.m3po.thinking.record import RolloutRecord
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

EOS = [2, *range(60, 68)]
TEMPERATURE, LENGTH, PATHS_OF_A_GROUP = 0.7, 24, 4
SIZE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,  # the smallest that vLLM's attention on a CPU has
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Livelier models blow rounding up: a soft thought is fed back, token after token.
    "initializer_range": 0.12,
}


def checkpoint(folder: Path, family: str, mode: str) -> Any:
    """A tiny model of fresh weights, saved with its tokenizer; the model."""
    torch.manual_seed(0)
    model = build(family, {**SIZE, **(STRONG if mode in ("hrpo", "h3po") else {})}).float().eval()
    model.save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return model


def prompts(lengths: Sequence[int] = (4, 9, 7)) -> list[list[int]]:
    g = torch.Generator().manual_seed(3)
    return [torch.randint(130, 256, (length,), generator=g).tolist() for length in lengths]


def table(groups: int, seed: int = 5) -> torch.Tensor:
    """Uniform numbers (B, T) for all paths of some groups."""
    return torch.rand(groups * PATHS_OF_A_GROUP, LENGTH, generator=torch.Generator().manual_seed(seed))


def draw(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """(B, 1) long: the token at which the distribution function of a row (B, V) reaches its number (B,)."""
    sums = probs.double().cumsum(-1)
    return torch.searchsorted(sums, uniform.double()[:, None] * sums[:, -1:]).clamp_max(probs.shape[-1] - 1)


class TableState(M3POGenerationState):
    """The state of `generate`, with the numbers of a table in place of torch's."""

    table: torch.Tensor

    def multinomial(self, probs: torch.Tensor, num_samples: int) -> torch.Tensor:
        self._probs = probs
        return draw(probs, self.table[:, self._step])


def generate(
    model: Any,
    settings: ThinkingSettings | None,
    asked: list[list[int]],
    numbers: torch.Tensor,
    tokenizer: Any = None,
    *,
    ends: Sequence[int] = EOS,
    greedy: bool = False,
) -> tuple[list[list[int]], RolloutRecord]:
    """The completions of `_sample` without what follows their end, and the record; plain ones without settings."""
    width, paths = max(map(len, asked)), 1 if settings is None else PATHS_OF_A_GROUP
    rows = [[0] * (width - len(one)) + one for one in asked for _ in range(paths)]
    ids, tokenizer = torch.tensor(rows), tokenizer or small_tokenizer()
    mask = [[0] * (width - len(one)) + [1] * len(one) for one in asked for _ in range(paths)]
    state = TableState(group_ids=torch.arange(len(ids)) // paths, settings=settings, tokenizer=tokenizer)
    state.table = numbers
    written = model.generate(
        input_ids=ids,
        attention_mask=torch.tensor(mask),
        m3po=state,
        do_sample=not greedy,
        temperature=None if greedy else TEMPERATURE,
        top_k=0,
        max_new_tokens=LENGTH,
        eos_token_id=[*ends] or SIZE["vocab_size"],  # a token that there is not
        pad_token_id=0,
        return_dict_in_generate=True,
    ).sequences[:, width:]
    lengths = [next((t + 1 for t, token in enumerate(row) if token in ends), len(row)) for row in written.tolist()]
    return [row[:n] for row, n in zip(written.tolist(), lengths, strict=True)], state.record


class TableSampler(Sampler):
    """Draws the tokens of every step by `draw`, also where none of its rows thinks."""

    keeps = property(lambda self: True, lambda self, value: None)  # type: ignore[assignment]


class TableWorker(Worker):
    """Draws with the numbers of `runner.table`, and the median for plain rows."""

    def init_device(self) -> None:
        super().init_device()
        runner = self.model_runner
        runner.sampler.__class__ = TableSampler

        def drawn(probs: torch.Tensor) -> torch.Tensor:
            numbers = []
            for request in runner.input_batch.req_ids:
                state = runner.requests[request]
                tag = Tag.of(request, state.sampling_params)
                row = runner.table.get((tag.group, tag.path)) if tag else None
                numbers.append(torch.tensor(0.5) if row is None else row[len(state.output_token_ids)])
            return draw(probs, torch.stack(numbers)).squeeze(-1)

        runner.sampler.draw = drawn


class BagsWorker(Worker):
    """Tells the bags of a group as JSON can."""

    def take_bags(self, group: str) -> dict[str, Any]:
        record, _ = self.take_m3po_records([group])
        return {"ids": record.bag_ids.tolist(), "weights": record.bag_weights.tolist()}


class Engine:
    """An engine in this process.

    Args:
        folder: of the checkpoint.
        architecture: of its configuration.
        settings: of the mode.
        arguments: more of vLLM's.
    """

    def __init__(self, folder: Path, architecture: str, settings: ThinkingSettings, **arguments: Any) -> None:
        size = {"max_model_len": 128, "max_num_batched_tokens": 256, "max_num_seqs": 64}
        ours = m3po_vllm.engine_arguments(settings.hyperparameters(), architecture)
        ours["worker_cls"] = "vllm_engine.TableWorker"
        self.llm = LLM(str(folder), dtype="float32", enforce_eager=True, **{**size, **ours, **arguments})
        self.runner.table = {}

    @property
    def runner(self) -> Any:
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner

    def roll_out(
        self, asked: list[list[int]], numbers: torch.Tensor, first: int = 0, plain: Sequence[list[int]] = ()
    ) -> tuple[list[list[int]], list[RolloutRecord], list[list[int]]]:
        """Groups g{first}, ... of these prompts, and plain requests among them, which draw the median.

        Returns:
            completions of the paths, the record of each group, completions of the plain ones.
        """
        sent: list[Any] = []
        params: list[SamplingParams] = []
        for number, prompt in enumerate(asked):
            for path in range(PATHS_OF_A_GROUP):
                name = f"g{first + number}"
                self.runner.table[name, path] = numbers[number * PATHS_OF_A_GROUP + path]
                sent.append({"prompt_token_ids": prompt})
                params.append(thinking_params({GROUP: name, PATH: path}))
        for place, prompt in enumerate(plain):
            sent.insert(2 * place, {"prompt_token_ids": prompt})
            params.insert(2 * place, SamplingParams(temperature=TEMPERATURE, max_tokens=LENGTH, stop_token_ids=EOS))
        outputs = self.llm.generate(sent, params, use_tqdm=False)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        thought = [one for one, asked_for in zip(tokens, params, strict=True) if asked_for.extra_args]
        told = [one for one, asked_for in zip(tokens, params, strict=True) if not asked_for.extra_args]
        return thought, [self.record(f"g{first + number}") for number in range(len(asked))], told

    def record(self, group: str) -> RolloutRecord:
        return self.llm.collective_rpc("take_m3po_records", args=([group],))[0][0]

    def close(self) -> None:
        shut_down(self.llm)
        del self.llm


def shut_down(llm: LLM) -> None:
    """Ends an engine of this process, so that the next one can begin."""
    llm.llm_engine.engine_core.shutdown()
    gc.collect()
    cleanup_dist_env_and_memory()


def thinking_params(tag: Mapping[str, Any], **more: Any) -> SamplingParams:
    given = {"temperature": TEMPERATURE, "max_tokens": LENGTH, "stop_token_ids": EOS}
    return SamplingParams(**{**given, **more}, extra_args={PATHS: PATHS_OF_A_GROUP, RECORD: True, **tag})
