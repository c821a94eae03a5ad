# SPDX-License-Identifier: Apache-2.0
"""Faster ways to what gating functions are made of, mostly on CPUs: products of rows over a vocabulary, largest
entries.

Each computes what its one-line docstring formula says; the formulas of the similarities themselves stand in the gating
functions.
"""

from __future__ import annotations

import torch

from .base import TINY

FEW = 8  # rows up to which the time of a product on a CPU goes by the number of entries
SUM_BLOCK = 512  # tokens of a sum; sums of 151,936 roots, added one after the other, are off by up to 4e-4
BUFFER = 1 << 20  # roots there at a time: fresh memory costs as much as they, and the caches hold 4 MiB
TOPK_BLOCK = 128  # entries of a block of `block_topk`


def gram(rows: torch.Tensor) -> torch.Tensor:
    """x · y of every two rows: (..., N, V) -> (..., N, N). Of few rows on a CPU, a quarter is its opposite's copy."""
    paths = rows.shape[-2]
    if rows.device.type != "cpu" or not 2 <= paths <= FEW:
        return rows @ rows.mT
    top, bottom = rows.tensor_split(2, dim=-2)
    upper = top @ rows.mT
    lower = torch.cat([upper[..., top.shape[-2] :].mT, bottom @ bottom.mT], dim=-1)
    return torch.cat([upper, lower], dim=-2)


def root_gram(probs: torch.Tensor) -> torch.Tensor:
    """Σ_v sqrt(p_v q_v) of every two rows: (..., N, V) float32 -> (..., N, N), symmetric, its gradient finite at 0.

    Sums are taken block by block. On a CPU without gradients, so are the roots, in a buffer that is used again.
    """
    paths, length = probs.shape[-2:]
    whole = length - length % SUM_BLOCK
    if probs.device.type != "cpu" or (torch.is_grad_enabled() and probs.requires_grad):
        roots = probs.clamp_min(TINY).sqrt()  # the root of 0 has no gradient; the clamp adds 1e-38 an entry
        blocks = roots[..., :whole].unflatten(-1, (-1, SUM_BLOCK)).transpose(-3, -2)  # (..., blocks, N, SUM_BLOCK)
        total = gram(blocks).sum(-3) + gram(roots[..., whole:])
        return (total + total.mT) / 2
    groups = probs.reshape(-1, paths, length)
    width = max(BUFFER // (len(groups) * paths * SUM_BLOCK), 1) * SUM_BLOCK
    parts = [part for part in (*groups[..., :whole].split(width, -1), groups[..., whole:]) if part.shape[-1]]
    buffer = probs.new_empty(max(part.numel() for part in parts))
    total = probs.new_zeros(len(groups), paths, paths)
    for part in parts:  # (G, N, v)
        roots = buffer[: part.numel()].view(paths, len(groups), -1)  # paths first: the blocks of all groups are evenly
        torch.sqrt(part, out=roots.transpose(0, 1))  # spaced then, and one batched product takes them without a copy
        blocks = roots.view(paths, -1, min(SUM_BLOCK, part.shape[-1])).transpose(0, 1)
        total += gram(blocks).view(len(groups), -1, paths, paths).sum(1)
    return ((total + total.mT) / 2).view(*probs.shape[:-1], paths)


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
    blocks = length // TOPK_BLOCK
    if blocks <= 4 * k:
        return values.topk(k, dim=-1)
    whole = values[..., : blocks * TOPK_BLOCK].unflatten(-1, (blocks, TOPK_BLOCK))
    chosen = whole.amax(-1).topk(k, dim=-1).indices  # (..., k)
    inside = whole.gather(-2, chosen.unsqueeze(-1).expand(*chosen.shape, TOPK_BLOCK)).flatten(-2)
    ids = (chosen.unsqueeze(-1) * TOPK_BLOCK + torch.arange(TOPK_BLOCK, device=values.device)).flatten(-2)
    if blocks * TOPK_BLOCK < length:  # the last entries, fewer than a block
        tail = torch.arange(blocks * TOPK_BLOCK, length, device=values.device)
        inside = torch.cat([inside, values[..., blocks * TOPK_BLOCK :]], dim=-1)
        ids = torch.cat([ids, tail.expand(*ids.shape[:-1], -1)], dim=-1)
    largest, where = inside.topk(k, dim=-1)
    return largest, ids.gather(-1, where)
