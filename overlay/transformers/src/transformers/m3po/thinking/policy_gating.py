# SPDX-License-Identifier: Apache-2.0
"""A learnable gating function in the policy pass: the weights of the bags once more, now with gradient.

The rollout keeps, for each thinking position, the likeliest tokens of the distribution that its gating function read,
which peers the path listened to, and T. From them the gating function works out A again, for whole groups of a
micro-batch at all positions at once, and so gets a gradient through the blended inputs, as eq. 8 of the M3PO paper
conditions the policy on them. The ids of the bags stay as they were rolled out.
"""

from __future__ import annotations

from typing import Any

import torch

from ..gating.base import TINY
from .bags import cross_path_bag_weights
from .interaction import PathGroups
from .record import GatingRecord
from .thoughts import recompute_blend_weights

LOWEST = torch.finfo(torch.float32).min
CHUNK_ENTRIES = 1 << 22  # entries of distributions that are alive at once


def recompute_bag_weights(
    gating: Any,
    embed_tokens: Any,
    bag_ids: torch.Tensor,
    bag_weights: torch.Tensor,
    record: GatingRecord,
    group_ids: torch.Tensor,
    cross_path_lambda: float,
    has_thoughts: bool,
) -> torch.Tensor:
    """The weights of bags as the gating function is now.

    Args:
        gating: a `LearnableGating`, or what PEFT has wrapped it in.
        embed_tokens: the model's input embedding, for a gating function that reads distributions through it.
        bag_ids, bag_weights: (B, T, K), as rolled out.
        record: of the same rows and positions.
        group_ids: (B,), whole groups whose rows are in the order of the rollout.
        cross_path_lambda: λ in (0, 1].
        has_thoughts: the bags are blended soft thoughts (mode h3po) and not the tokens of the group (mode m3po).

    Returns:
        (B, T, K) float32: equal to `bag_weights` for the gating function of the rollout, with gradient to its
        parameters.
    """
    groups = PathGroups(group_ids)
    length = bag_ids.shape[1]
    step = max(1, CHUNK_ENTRIES // max(1, len(bag_ids) * record.ids.shape[-1] * groups.size))
    with torch.autocast(bag_weights.device.type, enabled=False):
        parts = []
        for start in range(0, max(1, length), step):
            at = slice(start, start + step)
            part, bags = record.positions(at), (bag_ids[:, at], bag_weights[:, at])
            peers = _attention(gating, embed_tokens, bags[1], part, groups)
            parts.append(
                _blended(*bags, part, peers, groups, cross_path_lambda)
                if has_thoughts
                else cross_path_bag_weights(peers, cross_path_lambda)
            )
        return torch.cat(parts, dim=1)


def _attention(
    gating: Any, embed_tokens: Any, bag_weights: torch.Tensor, record: GatingRecord, groups: PathGroups
) -> torch.Tensor:
    """A of the recorded peers: (B, T, P)."""
    by_group = [groups.split(part).transpose(1, 2) for part in (record.probs, record.ids)]  # (G, T, N, K)
    similarity = gating(by_group[0], ids=by_group[1], embed_tokens=embed_tokens)
    rows, there = _peer_rows(record, groups)
    active = (bag_weights > 0).any(-1)  # (B, T)
    of_peers = active.T.unsqueeze(0).expand(len(active), -1, -1).gather(-1, rows)
    heard = active.unsqueeze(-1) & of_peers & there
    slots = record.slots.long().clamp_max(groups.size - 1)
    scores = groups.rows(similarity.transpose(1, 2)).gather(-1, slots)
    # Over the recorded peers alone: what a gating function that has changed says of others does not count.
    scores = (scores / record.temperature.clamp_min(TINY).unsqueeze(-1)).masked_fill(~heard, LOWEST)
    return scores.softmax(-1) * heard


def _peer_rows(record: GatingRecord, groups: PathGroups) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of the recorded peers (B, T, P), and whether there is one: groups may be of different size."""
    slots = record.slots.long()
    inside = slots.clamp_max(groups.size - 1)
    members, present = (
        part[groups.group].unsqueeze(1).expand(-1, slots.shape[1], -1).gather(-1, inside)
        for part in (groups.members, groups.present)
    )
    return members, present & (slots < groups.size)


def _blended(
    bag_ids: torch.Tensor,
    bag_weights: torch.Tensor,
    record: GatingRecord,
    peers: torch.Tensor,
    groups: PathGroups,
    cross_path_lambda: float,
) -> torch.Tensor:
    """The weights of blended thoughts, all positions as rows of one batch: (B, T, K)."""
    batch, length, _ = bag_ids.shape
    steps = torch.arange(length, device=bag_ids.device).view(1, -1, 1)
    rows = _peer_rows(record, groups)[0] * length + steps  # of the flattened (B, T)
    thoughts = record.probs / record.norm.unsqueeze(-1).clamp_min(TINY)
    bag_ids, bag_weights, ids, weights, peers, rows = (
        part.flatten(0, 1) for part in (bag_ids, bag_weights, record.ids, thoughts, peers, rows)
    )
    blended = recompute_blend_weights(bag_ids, bag_weights, ids, weights, peers, rows, cross_path_lambda)
    return blended.unflatten(0, (batch, length))
