# SPDX-License-Identifier: Apache-2.0
"""Soft thoughts as bags (HRPO, arXiv 2505.18454, section 3), and their blend across a group (mode h3po).

A soft thought is h = (p E) / ||p||_2, p the distribution that a token was sampled from. Its bag holds the k likeliest
tokens with the weights p_k / ||p||_2, the norm being that of the whole p: what a bag leaves out is the tail of the sum,
whose size docs/modes.md gives. The whole product would read the embedding matrix once a step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class TopKTokens(NamedTuple):
    """The likeliest tokens of distributions.

    Attributes:
        ids: (B, K) int32.
        probs: (B, K) float32, their probabilities.
        norm: (B, 1) float32, ||p||_2 of the whole distributions.
    """

    ids: torch.Tensor
    probs: torch.Tensor
    norm: torch.Tensor

    def spread(self, rows: torch.Tensor, num_rows: int) -> TopKTokens:
        """These tokens at `rows` (R,) long of a batch of `num_rows`; every other row has token 0, for certain."""
        ids = self.ids.new_zeros(num_rows, self.ids.shape[-1])
        probs = torch.zeros_like(ids, dtype=self.probs.dtype)
        probs[:, 0] = 1.0
        norm = self.norm.new_ones(num_rows, 1)
        whole = ids, probs, norm
        return TopKTokens(*(each.index_copy_(0, rows, mine) for each, mine in zip(whole, self, strict=True)))


def top_k_tokens(probs: torch.Tensor, top_k: int, num_embeddings: int) -> TopKTokens:
    """What a bag or a learnable gating function keeps of distributions.

    Args:
        probs: p (B, V) float32.
        top_k: k; 0 keeps the whole vocabulary.
        num_embeddings: rows of the embedding matrix. Tokens beyond it (a padded head) have no embedding: they stay in
            the norm, and their probability becomes 0.

    Returns:
        K = min(k, V) or, for the whole vocabulary, V entries.
    """
    norm = torch.linalg.vector_norm(probs, dim=-1, keepdim=True)
    if top_k and top_k < probs.shape[-1]:
        top, ids = probs.topk(top_k, dim=-1)
    else:
        top, ids = probs, torch.arange(probs.shape[-1], device=probs.device).expand_as(probs)
    if num_embeddings < probs.shape[-1]:
        known = ids < num_embeddings
        top, ids = top * known, ids * known
    return TopKTokens(ids.int(), top, norm)


def thought_bags(probs: torch.Tensor, top_k: int, num_embeddings: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The soft thoughts of distributions; arguments as `top_k_tokens`.

    Returns:
        ids (B, K) int32 and weights (B, K) float32.
    """
    top = top_k_tokens(probs, top_k, num_embeddings)
    return top.ids, top.probs / top.norm


def blend_thoughts(
    ids: torch.Tensor,
    weights: torch.Tensor,
    peers: torch.Tensor,
    peer_rows: torch.Tensor,
    cross_path_lambda: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blends the thoughts of a group: (1 - λ) h_i + λ Σ_j A_ij h_j, equal tokens merged, the K largest entries kept.

    Args:
        ids, weights: (B, K), the paths' own thoughts.
        peers: (B, P) float32, how much a path listens to each of its peers (A); all zero for a path without any.
        peer_rows: (B, P) long, the rows of these peers.
        cross_path_lambda: λ in (0, 1].

    Returns:
        ids (B, K) int32 and weights (B, K) float32. A path without an active peer keeps its own, bit for bit.
    """
    all_ids, token, merged = _merge(ids, weights, peers, peer_rows, cross_path_lambda)
    merged_ids = torch.zeros_like(all_ids).scatter(-1, token, all_ids)
    top, place = merged.topk(ids.shape[-1], dim=-1)
    listens = (peers > 0).any(-1, keepdim=True)
    return torch.where(listens, merged_ids.gather(-1, place), ids), torch.where(listens, top, weights)


def recompute_blend_weights(
    bag_ids: torch.Tensor,
    bag_weights: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    peers: torch.Tensor,
    peer_rows: torch.Tensor,
    cross_path_lambda: float,
) -> torch.Tensor:
    """What `blend_thoughts` would weigh the tokens with that it chose before, differentiable in `peers`.

    Args:
        bag_ids, bag_weights: (B, K), its answer for the same thoughts, at these `peers` or at others.
        The rest as there.

    Returns:
        (B, K) float32: 0 where `bag_weights` is, and `bag_weights` itself for a path without an active peer.
    """
    all_ids, token, merged = _merge(ids, weights, peers, peer_rows, cross_path_lambda)
    place = torch.searchsorted(all_ids, bag_ids.contiguous()).clamp_max(all_ids.shape[-1] - 1)
    chosen = merged.gather(-1, token.gather(-1, place))
    listens = (peers > 0).any(-1, keepdim=True)
    return torch.where(listens & (bag_weights > 0), chosen, bag_weights)


def _merge(
    ids: torch.Tensor, weights: torch.Tensor, peers: torch.Tensor, peer_rows: torch.Tensor, cross_path_lambda: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The entries of the blends by rising token (B, E), the place of each among the different ones, the sums there."""
    heard = cross_path_lambda * peers.unsqueeze(-1) * weights[peer_rows]  # (B, P, K)
    all_weights = torch.cat([(1.0 - cross_path_lambda) * weights, heard.flatten(1)], dim=-1)
    all_ids, order = torch.cat([ids, ids[peer_rows].flatten(1)], dim=-1).sort(dim=-1, stable=True)
    all_weights = all_weights.gather(-1, order)
    first = torch.ones_like(all_ids, dtype=torch.bool)
    first[:, 1:] = all_ids[:, 1:] != all_ids[:, :-1]
    token = first.cumsum(-1) - 1  # every entry's place among the different tokens of its row
    return all_ids, token, torch.zeros_like(all_weights).scatter_add(-1, token, all_weights)
