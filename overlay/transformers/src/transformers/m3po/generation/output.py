# SPDX-License-Identifier: Apache-2.0
"""What `generate` returns in a thinking mode or with ASLR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...utils import ModelOutput


@dataclass
class M3POGenerateOutput(ModelOutput):
    """What `generate` returns in a thinking mode or with ASLR when an output object is asked for.

    The first four fields stand in the order of the tuple that the prototype notes return; T counts completion tokens.

    Args:
        sequences: (B, L + T) long.
        thinking_embeds: (B, T, H), the inputs the model got at the completion's positions; only with
            `return_thinking_embeds`.
        thinking_mask: (B, T) bool, the tokens of the thinking phase.
        embeds_ratio: (B, T) float32, the share of the token's own embedding in its input: in mode m3po 1 - λ where
            blended, with a residual gate the mean of its a over H where a thought was mixed in; else 1.
        bag_ids, bag_weights: (B, T, K) int32 and float32, see `transformers.m3po`.
        rollout_logps: (B, T) float32, log-prob of each sampled token in the distribution it was sampled from; 0 after
            the end of a row.
        row_seeds: (B,) long, what the noise of ASLR was made of; None where it did not run.
        statistics: means over the rollout, 0-dim tensors by name, see `attention_statistics`, `residual_statistics`
            and `LatentRollout.end`.
        scores, logits, attentions, hidden_states, past_key_values: as in `GenerateDecoderOnlyOutput`.
    """

    sequences: torch.Tensor | None = None
    thinking_embeds: torch.Tensor | None = None
    thinking_mask: torch.Tensor | None = None
    embeds_ratio: torch.Tensor | None = None
    bag_ids: torch.Tensor | None = None
    bag_weights: torch.Tensor | None = None
    rollout_logps: torch.Tensor | None = None
    row_seeds: torch.Tensor | None = None
    statistics: dict[str, torch.Tensor] | None = None
    scores: tuple[torch.Tensor, ...] | None = None
    logits: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[Any, ...] | None = None
    hidden_states: tuple[Any, ...] | None = None
    past_key_values: Any = None
