# SPDX-License-Identifier: Apache-2.0
"""vLLM's sampler, which keeps the distributions of a step for what thinks in it."""

from __future__ import annotations

from typing import Any

import torch
from transformers.m3po.generation.sampling import invert_cdf
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler as UpstreamSampler

GREEDY = 1e-5  # below it vLLM takes a temperature for 0


class Sampler(UpstreamSampler):
    """As vLLM's; where a step has thinking rows, and nothing but temperatures shape it, tokens are drawn here.

    Attributes:
        keeps: whether the next step has thinking rows.
        scores: (B, V) float32, the logits of the last such step over the temperature (greedy rows: as they are).
        probs: (B, V) float32, their softmax, which the tokens were drawn from.
    """

    keeps = False
    scores: torch.Tensor
    probs: torch.Tensor

    def sample(
        self, logits: torch.Tensor, sampling_metadata: SamplingMetadata, logprobs_mode_override: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not self.keeps:
            return super().sample(logits, sampling_metadata, logprobs_mode_override)
        temperature = sampling_metadata.temperature
        if sampling_metadata.all_greedy or temperature is None:
            self.scores = logits
        else:
            self.scores = logits / torch.where(temperature < GREEDY, 1.0, temperature).unsqueeze(-1)
        self.probs = self.scores.softmax(-1)
        shaped = sampling_metadata.top_k is not None or sampling_metadata.top_p is not None
        shaped |= any(getattr(part, "min_p_count", 0) for part in sampling_metadata.logitsprocs.argmax_invariant)
        if not sampling_metadata.all_random or shaped or sampling_metadata.generators:
            return super().sample(logits.clone(), sampling_metadata, logprobs_mode_override)
        mode = logprobs_mode_override or self.logprobs_mode
        kept = {"processed_logprobs": self.probs.log, "processed_logits": lambda: self.scores}.get(mode)
        wanted = sampling_metadata.max_num_logprobs is not None and kept is not None
        return self.draw(self.probs), kept() if wanted and kept is not None else None

    def draw(self, probs: torch.Tensor) -> torch.Tensor:
        """(B,) long, one token a row."""
        return invert_cdf(probs).squeeze(-1)
