# SPDX-License-Identifier: Apache-2.0
"""How a model decodes when it is evaluated: with its soft thoughts, as N paths, with the latent paths of ASLR."""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lm_eval.api.task import Task
from transformers import PreTrainedTokenizerBase
from transformers.m3po import M3POGenerationState, ThinkingSettings

TOKENS = "tokens"  # their number, beside the statistics of ASLR


@dataclass(frozen=True)
class Thoughts:
    """One greedy path whose thinking inputs stay on, as in training but without peers (modes hrpo and h3po).

    Args:
        settings: of mode `hrpo`.
        temperature: the temperature of the distributions that the thoughts are made of, as the run sampled.
    """

    settings: ThinkingSettings
    temperature: float

    @classmethod
    def of_mode(cls, settings: ThinkingSettings | None, temperature: float) -> "Thoughts | None":
        """The thoughts of a checkpoint with these settings; None in the modes that decode plainly."""
        if settings is None or not settings.has_thoughts:
            return None
        return cls(replace(settings, mode="hrpo"), temperature)

    def state(self, tokenizer: PreTrainedTokenizerBase, row_seeds: torch.Tensor | None = None) -> M3POGenerationState:
        """The state of a rollout."""
        return M3POGenerationState(
            settings=self.settings,
            tokenizer=tokenizer,
            thought_temperature=self.temperature,
            row_seeds=row_seeds,
        )


@dataclass(frozen=True)
class Paths:
    """N completions of each problem: plain independent samples, or with `settings` as the mode decodes in training.

    That is a group whose paths interact (m3po, h3po), or samples with soft thoughts (hrpo).

    Nothing is cut off the distribution (top_k 0, top_p 1), as in training. Every batch has a seed of its own, made of
    `seed` and its number, so that an evaluation that was stopped goes on with the same samples.
    """

    number: int
    temperature: float
    settings: ThinkingSettings | None
    seed: int = 0

    def configure(self, task: Task) -> None:
        """Make a task ask for N samples of each problem."""
        sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        task.set_config("generation_kwargs", sampling, update=True)
        task.set_config("repeats", self.number)

    def seed_batch(self, number: int) -> None:
        """Set torch's generators for a batch."""
        torch.manual_seed(random.Random(f"{self.seed}-{number}").getrandbits(63))

    def state(
        self, rows: torch.Tensor, tokenizer: PreTrainedTokenizerBase, row_seeds: torch.Tensor | None = None
    ) -> M3POGenerationState | None:
        """The state of a rollout of the prompts `rows` (B, L); None for independent samples without ASLR.

        Raises:
            ValueError: when the rows are not whole groups of one prompt each, side by side.
        """
        if self.settings is None:
            return None if row_seeds is None else M3POGenerationState(row_seeds=row_seeds)
        whole = len(rows) % self.number == 0
        if not whole or not torch.equal(rows[:: self.number].repeat_interleave(self.number, 0), rows):
            raise ValueError(f"a batch of {len(rows)} rows is not made of whole groups of {self.number} paths.")
        return M3POGenerationState(
            group_ids=torch.arange(len(rows)) // self.number,
            settings=self.settings,
            tokenizer=tokenizer,
            row_seeds=row_seeds,
        )


@dataclass(frozen=True)
class LatentPaths:
    """ASLR on, as in training; without this an evaluation leaves its loop out (`is_m3po_inference`).

    The noise of a row depends on its prompt, the number of the path and `seed`, not on the batch it is decoded in.

    Args:
        seed: of the noise.
        max_iterations: rounds in place of the model's; None takes those.
    """

    seed: int = 0
    max_iterations: int | None = None

    @property
    def overrides(self) -> dict[str, int]:
        """The numbers of ASLR that are not the model's."""
        return {} if self.max_iterations is None else {"aslr_max_iterations": self.max_iterations}

    def row_seeds(self, rows: torch.Tensor, mask: torch.Tensor, num_paths: int) -> torch.Tensor:
        """The seeds (B,) of the prompts `rows` (B, L) with their mask, the paths of a prompt side by side."""
        prompts = zip(rows.cpu(), mask.bool().cpu(), strict=True)
        texts = [ids[is_token].numpy().tobytes() for ids, is_token in prompts]
        return torch.tensor(
            [zlib.crc32(f"{self.seed}-{index % num_paths}-".encode() + text) for index, text in enumerate(texts)]
        )


@dataclass(frozen=True)
class Decoding:
    """How the completions of an evaluation are decoded.

    Args:
        batch_size: rows decoded together, of similar length; with `paths`, rounded to whole groups.
        precision: `no`, or the autocast of the training.
        chat_template_kwargs: arguments of the chat template besides the turns.
        thoughts: soft thoughts of a greedy path; without effect with `paths`.
        paths: samples N completions of each problem in place of a greedy one.
        latent_paths: makes ASLR run, on a model that has it.
    """

    batch_size: int
    precision: str = "no"
    chat_template_kwargs: dict[str, Any] | None = None
    thoughts: Thoughts | None = None
    paths: Paths | None = None
    latent_paths: LatentPaths | None = None

    @property
    def rows(self) -> int:
        """The rows of a batch: whole groups of paths, one at least."""
        if self.paths is None:
            return self.batch_size
        return max(1, self.batch_size // self.paths.number) * self.paths.number

    def state(
        self, prompts: torch.Tensor, mask: torch.Tensor, tokenizer: PreTrainedTokenizerBase
    ) -> M3POGenerationState | None:
        """The state of a rollout of the prompts (B, L) with their mask (B, L); None for plain decoding.

        Raises:
            ValueError: see `Paths.state`.
        """
        seeds, state = None, None
        if self.latent_paths is not None:
            seeds = self.latent_paths.row_seeds(prompts, mask, 1 if self.paths is None else self.paths.number)
        if self.paths is not None:
            state = self.paths.state(prompts, tokenizer, seeds)
        elif self.thoughts is not None:
            state = self.thoughts.state(tokenizer, seeds)
        elif seeds is not None:
            state = M3POGenerationState(row_seeds=seeds)
        if state is not None:
            state.aslr_overrides = {} if self.latent_paths is None else self.latent_paths.overrides
        return state


def router_of_batch(state: M3POGenerationState | None) -> dict[str, float]:
    """The statistics of a rollout by name (`LatentRollout.end`) and the number of its tokens; {} without ASLR."""
    if state is None or "router_weight_mean" not in state.statistics:
        return {}
    names = [name for name in state.statistics if name.startswith(("router", "activation", "latent"))]
    return {TOKENS: int((state.rollout_logps != 0).sum()), **{name: float(state.statistics[name]) for name in names}}


def router_statistics(batches: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the tokens of batches, and their number; {} where ASLR ran in none."""
    known = [batch for batch in batches if batch]
    tokens = sum(batch[TOKENS] for batch in known)
    if not tokens:
        return {}
    names = [name for name in known[0] if name != TOKENS]
    return {TOKENS: tokens, **{name: sum(batch[TOKENS] * batch[name] for batch in known) / tokens for name in names}}


def router_line(label: str, statistics: dict[str, float]) -> str:
    """The statistics in a line."""
    before, after = statistics["latent_diversity_before"], statistics["latent_diversity_after"]
    return (
        f"ASLR {label}: the router activates {statistics['activation_rate_actual']:.1%} of {statistics[TOKENS]} "
        f"tokens, mean score {statistics['router_weight_mean']:.4f}; latent paths {before:.4f} apart before the "
        f"rounds, {after:.4f} after"
    )
