# SPDX-License-Identifier: Apache-2.0
"""Gates without parameters: cosine (M3PO paper, eq. 3), dot products, Jensen-Shannon, Bhattacharyya (seed 3, E16).

A default temperature is the one at which the attention of typical groups has the entropy of the baseline's at its own
0.1 (docs/gates.md): at one common temperature, gates of different range would be compared by their temperature.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from .base import BaseM3POGating
from .block_topk import block_topk
from .gram import TINY, gram, root_gram

SUPPORT = 128  # likeliest tokens of each path that the Jensen-Shannon divergence is worked out on
EXACT_CHUNK = 1024  # tokens that an exact divergence takes at a time


def cosine_similarity(probs: torch.Tensor) -> torch.Tensor:
    """Cosine of every pair of distributions (eq. 3): probs (..., N, V) float32 -> (..., N, N) float32 in [0, 1].

    The norms are the roots of the diagonal of the product, so that the vocabulary is read once.
    """
    product = gram(probs)
    norm = product.diagonal(dim1=-2, dim2=-1).clamp_min(TINY).sqrt()
    return (product / (norm[..., :, None] * norm[..., None, :])).clamp_max(1.0)


class CosineGating(BaseM3POGating):
    """`baseline`: S = p · q / (|p| |q|), in [0, 1]; the M3PO paper's."""

    default_temperature = 0.1

    def compute_similarity_matrix(self, probs: torch.Tensor) -> torch.Tensor:
        return cosine_similarity(probs)


class RawDotProductGating(BaseM3POGating):
    """`raw_dot`: S = p · q, in [0, 1]: the probability that both paths draw the same token. Sure paths weigh more."""

    default_temperature = 0.02

    def compute_similarity_matrix(self, probs: torch.Tensor) -> torch.Tensor:
        return gram(probs)


class ScaledDotProductGating(BaseM3POGating):
    """`scaled_dot`: S = p · q / sqrt(V), in [0, 1 / sqrt(V)]: `raw_dot` at another temperature, and nothing else (E16).

    The default temperature is `raw_dot`'s over sqrt(49,152), SmolLM2's vocabulary.
    """

    default_temperature = RawDotProductGating.default_temperature / math.sqrt(49152)

    def compute_similarity_matrix(self, probs: torch.Tensor) -> torch.Tensor:
        return gram(probs) / math.sqrt(probs.shape[-1])


class BhattacharyyaGating(BaseM3POGating):
    """`bhattacharyya`: S = Σ_v sqrt(p_v q_v), in [0, 1]; 1 minus the square of the Hellinger distance."""

    default_temperature = 0.125

    def compute_similarity_matrix(self, probs: torch.Tensor) -> torch.Tensor:
        return root_gram(probs).clamp_max(1.0)


class KLDivergenceGating(BaseM3POGating):
    """`kl_divergence`: S = 1 - sqrt(JSD(p, q) / ln 2), in [0, 1]; the root is a metric (Endres and Schindelin, 2003).

    JSD is worked out on the union of the 128 likeliest tokens of each path of the group. The mass outside adds between
    what it would if it lay on one token and what it would if the two shared nothing there; half-way is taken, and the
    largest distance to either end is kept (`similarity_error`). With few tokens outside there is nothing to be wrong
    about. `gating_config: {exact: true}` takes the whole vocabulary, in chunks.
    """

    default_temperature = 0.0625
    options = ("exact",)

    def __init__(self, config: Mapping[str, Any] | None = None):
        super().__init__(config)
        self.exact = bool((config or {}).get("exact", False))
        self._error: torch.Tensor | None = None

    def compute_similarity_matrix(self, probs: torch.Tensor) -> torch.Tensor:
        paths, vocabulary = probs.shape[-2:]
        if self.exact or paths * SUPPORT >= vocabulary:
            return _root_similarity(_exact_divergence(probs))
        low, high = _bounded_divergence(probs)
        with torch.no_grad():
            error = (_root_similarity(low) - _root_similarity(high)).abs().amax()
            self._error = error if self._error is None else torch.maximum(self._error, error)
        return _root_similarity((low + high) / 2)

    def statistics(self) -> dict[str, torch.Tensor]:
        """similarity_error: how far S can be off at most, the largest of the rollout; nothing where it was exact."""
        return {} if self._error is None else {"similarity_error": self._error}


def _root_similarity(divergence: torch.Tensor) -> torch.Tensor:
    """1 - sqrt(JSD / ln 2) of JSD in nats; at 0 the gradient is 0 instead of infinite."""
    share = (divergence / math.log(2.0)).clamp(1e-12, 1.0)
    return 1.0 - share.sqrt()


def _entropy(probs: torch.Tensor) -> torch.Tensor:
    """-Σ p ln p over the last axis, its gradient finite at 0."""
    return -(probs * probs.clamp_min(TINY).log()).sum(-1)


def _pair_divergence(probs: torch.Tensor) -> torch.Tensor:
    """Σ_v [(p ln p + q ln q) / 2 - m ln m], m = (p + q) / 2, of every pair: (..., N, K) -> (..., N, N)."""
    paths = probs.shape[-2]
    left, right = torch.triu_indices(paths, paths, 1, device=probs.device)
    own = _entropy(probs)
    middle = _entropy((probs[..., left, :] + probs[..., right, :]) / 2)
    gap = middle - (own[..., left] + own[..., right]) / 2
    pairs = probs.new_zeros(*probs.shape[:-1], paths)
    pairs[..., left, right] = gap
    pairs[..., right, left] = gap
    return pairs


def _exact_divergence(probs: torch.Tensor) -> torch.Tensor:
    """JSD in nats over the whole vocabulary, in chunks of it: no (..., N, N, V) at any time."""
    parts = [_pair_divergence(chunk) for chunk in probs.split(EXACT_CHUNK, dim=-1)]
    return torch.stack(parts).sum(0).clamp_min(0.0)


def _bounded_divergence(probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower and upper end of JSD in nats from the union of the likeliest tokens of the paths: (..., N, N) each."""
    ids = block_topk(probs.detach(), SUPPORT)[1].flatten(-2).sort(-1).values  # (..., N * SUPPORT), some of them twice
    first = torch.ones_like(ids, dtype=torch.bool)
    first[..., 1:] = ids[..., 1:] != ids[..., :-1]
    inside = probs.gather(-1, ids.unsqueeze(-2).expand(*probs.shape[:-1], -1)) * first.unsqueeze(-2)
    rest = (1.0 - inside.sum(-1, keepdim=True)).clamp_min(0.0)
    shared = _pair_divergence(inside)
    low = shared + _pair_divergence(rest)
    high = shared + (rest + rest.transpose(-1, -2)) / 2 * math.log(2.0)
    return low.clamp_min(0.0), torch.maximum(low, high).clamp_min(0.0)
