# SPDX-License-Identifier: Apache-2.0
"""Weighted sums of token embeddings."""

from __future__ import annotations

from collections.abc import Callable

import torch

# Embeddings of bag entries that are alive at once while a scoring pass mixes them (elements, not bytes).
MIX_CHUNK_ELEMENTS = 1 << 25


def bag_vectors(
    embed_tokens: Callable[[torch.Tensor], torch.Tensor],
    bag_ids: torch.Tensor,
    bag_weights: torch.Tensor,
    hidden_size: int,
) -> torch.Tensor:
    """The vectors of bags (B, T, K), in chunks over T: (B, T, H) float32."""
    batch, _, entries = bag_ids.shape
    step = max(1, MIX_CHUNK_ELEMENTS // max(1, batch * entries * hidden_size))
    with torch.autocast(bag_weights.device.type, enabled=False):
        chunks = zip(bag_ids.split(step, dim=1), bag_weights.split(step, dim=1), strict=True)
        return torch.cat(
            [(embed_tokens(ids).float() * weights.unsqueeze(-1)).sum(-2) for ids, weights in chunks], dim=1
        )
