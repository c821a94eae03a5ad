# SPDX-License-Identifier: Apache-2.0
"""Doubly stochastic matrices from logits: Sinkhorn-Knopp (mHC, eq. 9), and convex sums of permutations (mHC-lite).

Axes: S streams, N positions. The token axis is the innermost one in here, because S is 4 and N is thousands: a sum over
S is then S - 1 additions of long rows.
"""

from __future__ import annotations

from itertools import permutations
from typing import Any

import torch

MAX_PERMUTED = 4  # S! is 24; at 5 it is 120, more columns than it saves time


def wide(values: torch.Tensor) -> torch.Tensor:
    """In float32; float64 stays."""
    return values if values.dtype == torch.float64 else values.float()


def sinkhorn(logits: torch.Tensor, num_iters: int = 20, tau: float = 1.0) -> torch.Tensor:
    """exp(logits / tau), normalised along rows and then along columns, `num_iters` times.

    A column sums to 1 up to rounding, a row to what the iterations reach. The first round is done on logarithms, after
    which no sum can be 0: each row and each column keeps an entry of at least 1 / S². The gradient is that of the
    iterations as they ran, recomputed from the logits. At tau=1 this is what Transformers' `DeepseekV4HyperConnection`
    computes with its eps at 0.

    Args:
        logits: (..., S, S) finite, any floating dtype.
        num_iters: rounds, at least 1.
        tau: divides the logits, above 0.

    Returns:
        (..., S, S) float32, or float64 from float64.

    Raises:
        ValueError: the matrices are not square, or a number breaks its rule.
    """
    if logits.dim() < 2 or logits.shape[-1] != logits.shape[-2]:
        raise ValueError(f"sinkhorn on shape {tuple(logits.shape)}: give square matrices (..., S, S).")
    if num_iters < 1 or not tau > 0:
        raise ValueError(f"num_iters={num_iters} and tau={tau}: give at least 1 round and a tau above 0.")
    *batch, streams, _ = logits.shape
    inner = (wide(logits) / tau).movedim((-2, -1), (0, 1)).reshape(streams, streams, -1)
    result = _Sinkhorn.apply(inner, num_iters).view(streams, streams, *batch).movedim((0, 1), (-2, -1))
    return result.contiguous()  # torch.bmm copies matrices of other strides one by one


class _Sinkhorn(torch.autograd.Function):
    """`sinkhorn` on (S, S, N): sum over axis 1 = row sums, over axis 0 = column sums."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, num_iters: int) -> torch.Tensor:
        ctx.save_for_backward(logits)
        ctx.num_iters = num_iters
        values = logits.log_softmax(1).log_softmax(0).exp_()
        for _ in range(num_iters - 1):
            values.div_(values.sum(1, keepdim=True))
            values.div_(values.sum(0, keepdim=True))
        return values

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (logits,) = ctx.saved_tensors
        gradient = gradient.contiguous()  # tokens innermost, as the values are
        rows = logits.log_softmax(1)
        first = values = rows.log_softmax(0).exp_()
        steps = []
        for _ in range(ctx.num_iters - 1):
            for axis in (1, 0):
                total = values.sum(axis, keepdim=True)
                values = values / total
                steps.append((axis, values, total))
        for axis, values, total in reversed(steps):  # y = x / sum(x): dx = (dy - sum(dy y)) / sum(x)
            gradient = (gradient - (gradient * values).sum(axis, keepdim=True)) / total
        gradient = gradient * first
        gradient = gradient - first * gradient.sum(0, keepdim=True)
        return gradient - rows.exp_() * gradient.sum(1, keepdim=True), None


def permutation_basis(num_streams: int) -> torch.Tensor:
    """The S! permutation matrices, each a row of S² entries 0 and 1: (S!, S²) float32; the identity comes first.

    Raises:
        ValueError: S is above 4.
    """
    if num_streams > MAX_PERMUTED:
        raise ValueError(
            f"mhc_residual='birkhoff' with mhc_num_streams={num_streams}: it weighs all S! permutations, so at most "
            f"{MAX_PERMUTED} streams; take mhc_residual='sinkhorn'."
        )
    orders = torch.tensor(list(permutations(range(num_streams))))
    return torch.nn.functional.one_hot(orders, num_streams).flatten(1).float()


def birkhoff(logits: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """The sum of permutation matrices with the weights softmax(logits): doubly stochastic up to rounding.

    Args:
        logits: (..., S!), any floating dtype.
        basis: of `permutation_basis`, (S!, S²).

    Returns:
        (..., S, S) float32, or float64 from float64.
    """
    weights = wide(logits).softmax(-1)
    streams = round(basis.shape[1] ** 0.5)
    return (weights @ basis.to(weights.dtype)).unflatten(-1, (streams, streams))
