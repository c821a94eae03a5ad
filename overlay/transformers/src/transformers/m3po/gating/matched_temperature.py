# SPDX-License-Identifier: Apache-2.0
"""`cross_path_temp: match`: the temperature at which the attention is as sharp as the baseline's."""

from __future__ import annotations

import math

import torch

from .base import TINY, attention_weights

MATCH = "match"  # the value of `cross_path_temp`
# T is looked for between these, in units of the spread of a group's similarities, on a grid that is refined twice.
LOWEST, HIGHEST = 1e-5, 1e4
GRID, ROUNDS = 65, 3


@torch.no_grad()
def matched_temperature(similarity: torch.Tensor, active_mask: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """T at which the attention of a group has, summed over its paths, the entropy of given weights.

    The entropy rises with T. Sharpness is then the same for all gating functions, and what differs is who is listened
    to; `scaled_dot` becomes `raw_dot`. T follows from the group alone, so groups do not touch each other.

    Args:
        similarity: (..., N, N) float32.
        active_mask: (..., N) bool.
        target: (..., N, N) float32, the weights whose entropy is matched.

    Returns:
        T (..., 1, 1) float32, above 0. Where no T has this entropy (two peers are equally the nearest) it is the lowest
        one, where every T has (each path has one peer) the highest; neither is so extreme that a gradient overflows.
    """
    wanted = torch.special.entr(target).sum((-2, -1))
    pairs = attention_weights(similarity, active_mask, 1.0)[1]
    highest = torch.where(pairs, similarity, -torch.inf).amax((-2, -1))
    lowest = torch.where(pairs, similarity, torch.inf).amin((-2, -1))
    spread = (highest - lowest).nan_to_num(1.0, 1.0, 1.0)
    spread = torch.where(spread > 0, spread, 1.0)
    low = torch.full_like(spread, math.log(LOWEST))
    high = torch.full_like(spread, math.log(HIGHEST))
    steps = torch.linspace(0.0, 1.0, GRID, device=similarity.device).view(-1, *[1] * spread.dim())
    for _ in range(ROUNDS):
        grid = low + (high - low) * steps  # (GRID, ...)
        scale = (grid.exp() * spread)[..., None, None].clamp_min(TINY)
        weights, _ = attention_weights(similarity, active_mask, scale)
        reached = torch.special.entr(weights).sum((-2, -1)) <= wanted
        place = reached.sum(0).clamp(1, GRID - 1).unsqueeze(0)  # of the first T at which the entropy is passed
        low, high = grid.gather(0, place - 1).squeeze(0), grid.gather(0, place).squeeze(0)
    return (((low + high) / 2).exp() * spread)[..., None, None].clamp_min(TINY)
