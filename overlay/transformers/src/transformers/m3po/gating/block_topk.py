# SPDX-License-Identifier: Apache-2.0
"""The k largest of a long row in two exact stages, which on a CPU is a few times faster than `torch.topk` alone."""

from __future__ import annotations

import torch

BLOCK = 128


def block_topk(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `values.topk(k)` (of equal values, others may be taken).

    The k largest lie in the k blocks whose largest entries are the largest: were one in another block, each of these k
    blocks would have an entry at least as large.

    Args:
        values: (..., V) floating.
        k: at most V.

    Returns:
        values (..., k), falling, and their indices (..., k) long.
    """
    length = values.shape[-1]
    blocks = length // BLOCK
    if blocks <= 4 * k:
        return values.topk(k, dim=-1)
    whole = values[..., : blocks * BLOCK].unflatten(-1, (blocks, BLOCK))
    chosen = whole.amax(-1).topk(k, dim=-1).indices  # (..., k)
    inside = whole.gather(-2, chosen.unsqueeze(-1).expand(*chosen.shape, BLOCK)).flatten(-2)
    ids = (chosen.unsqueeze(-1) * BLOCK + torch.arange(BLOCK, device=values.device)).flatten(-2)
    if blocks * BLOCK < length:  # the last entries, fewer than a block
        tail = torch.arange(blocks * BLOCK, length, device=values.device)
        inside = torch.cat([inside, values[..., blocks * BLOCK :]], dim=-1)
        ids = torch.cat([ids, tail.expand(*ids.shape[:-1], -1)], dim=-1)
    largest, where = inside.topk(k, dim=-1)
    return largest, ids.gather(-1, where)
