# SPDX-License-Identifier: Apache-2.0
"""`apply_m3po_to_logits`: the paths of a group interact in their output distributions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from ..debugging import debugging, log_attention
from ..gating.base import TINY
from .interaction import (
    GatingFunction,
    PathGroups,
    Temperature,
    gating_name,
    group_attention,
    mask_of,
    temperature_of,
)

CHUNK_ELEMENTS = 1 << 24  # probabilities that are worked on at once


def apply_m3po_to_logits(
    logits: torch.Tensor,
    group_ids: torch.Tensor | Sequence[int],
    thinking_mask: torch.Tensor | Sequence[Sequence[bool]],
    gating_function: GatingFunction | None = None,
    lambda_blend: float = 0.1,
    temperature: Temperature | None = None,
) -> torch.Tensor:
    """Blends the distributions of a group position by position: p'_i = (1 - λ) p_i + λ Σ_j A_ij p_j.

    **This is not the policy that was rolled out**. The rollout blends the *inputs* of the paths that
    think, and samples each token from the model's own distribution; here the model reads plain tokens and the *outputs*
    are blended, of positions that are alike in nothing but their number. It is the policy "draw a path of the group, my
    own with probability 1 - λ, and take what it would say at this position": a way to get a gradient to a gating
    function without going through the model, offered as `gating_training: logits`.

    Args:
        logits: (B, T, V) floating, already divided by the sampling temperature.
        group_ids: (B,) integers, the groups of the rows.
        thinking_mask: (B, T) bool, the tokens of the thinking phase; a list will do.
        gating_function: similarity (..., N, V) -> (..., N, N); None is the cosine.
        lambda_blend: λ in [0, 1].
        temperature: T of eq. 5, above 0, or `match`; None is that of the gating function (`temperature_of`).

    Returns:
        log p' (B, T, V) float32: a path's own log-softmax where it is not thinking, has no thinking peer, or λ = 0.
        Worked out in chunks over T, each of them again in the backward pass, so that beside input and output a fixed
        number of probabilities is alive.

    Raises:
        ValueError: λ or T breaks its rule.
    """
    if not 0.0 <= lambda_blend <= 1.0:
        raise ValueError(f"lambda_blend={lambda_blend} is outside [0, 1]; the paper uses 0.1.")
    scale = temperature_of("temperature", temperature, gating_function)
    mask = mask_of(thinking_mask, logits)
    if lambda_blend == 0.0:
        return logits.float().log_softmax(-1)
    step = max(1, CHUNK_ELEMENTS // max(1, logits.shape[0] * logits.shape[2]))
    blend = partial(
        _blend, PathGroups(torch.as_tensor(group_ids, device=logits.device)), gating_function, lambda_blend, scale
    )
    parts = zip(logits.split(step, dim=1), mask.split(step, dim=1), strict=True)
    return torch.cat([checkpoint(blend, *part, use_reentrant=False) for part in parts], dim=1)


def _blend(
    groups: PathGroups,
    gating_function: GatingFunction | None,
    lambda_blend: float,
    temperature: Temperature,
    logits: torch.Tensor,
    thinking_mask: torch.Tensor,
) -> torch.Tensor:
    with torch.autocast(logits.device.type, enabled=False):
        own = logits.float().log_softmax(-1)
        probs = groups.split(own.exp()).transpose(1, 2)  # (G, T, N, V)
        active = (groups.split(thinking_mask) & groups.present.unsqueeze(-1)).transpose(1, 2)
        attention = group_attention(probs, active, temperature, gating_function)
        if debugging() or getattr(gating_function, "debug", False):
            log_attention("logits", attention, active, lambda_blend, gating_name(gating_function))
        weights = attention.weights
        blended = (1.0 - lambda_blend) * probs + lambda_blend * (weights @ probs)
        listens = groups.rows((weights > 0).any(-1, keepdim=True).transpose(1, 2))
        return torch.where(listens, groups.rows(blended.transpose(1, 2)).clamp_min(TINY).log(), own)
