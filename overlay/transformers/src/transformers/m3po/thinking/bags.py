# SPDX-License-Identifier: Apache-2.0
"""The bag: one form for every thinking vector, made in the rollout and read again in the scoring passes.

A position j of the completion owns the bag at index j: it belongs to the *input* of token j, was made of the
distributions that the tokens of this step were sampled from, and so acts on token j + 1. Without a residual gate the
bag's vector is the input (mode m3po); with one, it is the thought that the residual gate mixes into the token's
embedding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..gating.base import TINY
from .interaction import PathGroups


class Peers(NamedTuple):
    """Whom each path listens to, and how much.

    Attributes:
        weights: (B, P) float32, A of the peers in the order of `groups.ring` or, cut, of falling weight; zero where
            there is none to listen to. P = N - 1, or `top_k` if that is less.
        rows: (B, P) long, the rows of these peers.
        slots: (B, P) long, where they stand in their group.
        cut: (B,) float32, the weight of the peers that were left out.
    """

    weights: torch.Tensor
    rows: torch.Tensor
    slots: torch.Tensor
    cut: torch.Tensor


def select_peers(weights: torch.Tensor, groups: PathGroups, top_k: int | None) -> Peers:
    """The peers of each path.

    Args:
        weights: (G, N, N), A of `path_attention`.
        groups: the groups of the rows.
        top_k: keep this many peers, their weights scaled to sum to 1 again; None keeps all.
    """
    peers = groups.rows(weights).gather(-1, groups.ring)[:, 1:]
    rows, slots = groups.peers[:, 1:], groups.ring[:, 1:]
    cut = peers.new_zeros(len(peers))
    if top_k is not None and top_k < peers.shape[-1]:
        largest, place = peers.topk(top_k, dim=-1)
        cut = peers.sum(-1) - largest.sum(-1)
        peers = largest / largest.sum(-1, keepdim=True).clamp_min(torch.finfo(largest.dtype).tiny)
        rows, slots = rows.gather(-1, place), slots.gather(-1, place)
    return Peers(peers, rows, slots, cut)


def exchange_groups(peers: Peers, groups: PathGroups, active: torch.Tensor) -> Peers:
    """In place of each peer the path that stands in its slot in the next group, if that one is active.

    Args:
        peers: of `select_peers`.
        groups: the groups of the rows.
        active: (B,) bool, the paths that take part.

    Returns:
        Peers whose weights sum to what they summed to before; a path whose others are all inactive listens to nobody.
    """
    rows = groups.members.roll(-1, 0)[groups.group.unsqueeze(-1), peers.slots]
    there = (groups.split(active) & groups.present).roll(-1, 0)[groups.group.unsqueeze(-1), peers.slots]
    weights = peers.weights * there
    scale = peers.weights.sum(-1, keepdim=True) / weights.sum(-1, keepdim=True).clamp_min(TINY)
    return peers._replace(weights=weights * scale, rows=rows)


def cross_path_bags(
    next_tokens: torch.Tensor, peers: torch.Tensor, peer_rows: torch.Tensor, cross_path_lambda: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 2 and 6 as bags: first the own token with weight 1 - λ, then the peers' tokens with λ A_ij.

    Args:
        next_tokens: (B,) long, the tokens just sampled.
        peers, peer_rows: (B, P), the weights and rows of `select_peers`.
        cross_path_lambda: λ in (0, 1].

    Returns:
        ids (B, P + 1) int32 and weights (B, P + 1) float32. A path that listens to nobody has weights of zero: no bag.
    """
    ids = torch.cat([next_tokens.unsqueeze(-1), next_tokens[peer_rows]], dim=-1)
    return ids.int(), cross_path_bag_weights(peers, cross_path_lambda)


def cross_path_bag_weights(peers: torch.Tensor, cross_path_lambda: float) -> torch.Tensor:
    """The weights of these bags: A of the peers (..., P) float32 -> (..., P + 1)."""
    listens = (peers > 0).any(-1, keepdim=True)
    return torch.cat([(1.0 - cross_path_lambda) * listens, cross_path_lambda * peers], dim=-1)
