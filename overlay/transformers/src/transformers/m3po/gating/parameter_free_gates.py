# SPDX-License-Identifier: Apache-2.0
"""Gating functions without parameters: cosine (M3PO paper, eq. 3), dot products, Jensen-Shannon, Bhattacharyya.

A default temperature is the one at which the attention of typical groups has the entropy of the baseline's at its own
0.1 (docs/gates.md): at one common temperature, gating functions of different range would be compared by
their temperature.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from .base import TINY, BaseM3POGating
from .kernels import block_topk, gram, root_gram

SUPPORT = 8  # likeliest tokens of each path that the Jensen-Shannon divergence is worked out on
EXACT_CHUNK = 1024  # tokens that an exact divergence takes at a time
ROUNDING = 4e-6  # of `root_gram`, at most; up to 2.7e-6 was seen over 151,936 tokens


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
    """`scaled_dot`: S = p · q / sqrt(V), in [0, 1 / sqrt(V)]: `raw_dot` at another temperature, and nothing else.

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

    JSD is worked out on the union of the 8 likeliest tokens of each path of the group. What the others add is bounded
    from both sides by two sums over the vocabulary and taken from in between (`_bounded_divergence`); the largest
    distance of S to what it would be at either bound is kept (`similarity_error`): below 0.08 for any distributions, 0
    up to rounding where nothing is left over. `gating_config: {exact: true}` works out every token, in chunks.
    """

    default_temperature = 0.0625
    options = ("exact",)

    def __init__(self, config: Mapping[str, Any] | None = None):
        super().__init__(config)
        self.exact = bool((config or {}).get("exact", False))
        self._error: torch.Tensor | None = None

    def compute_similarity_matrix(self, probs: torch.Tensor) -> torch.Tensor:
        paths, vocabulary = probs.shape[-2:]
        if self.exact or vocabulary <= max(paths * SUPPORT, EXACT_CHUNK):
            return _root_similarity(_exact_divergence(probs))
        highest, similarity, lowest = (_root_similarity(divergence) for divergence in _bounded_divergence(probs))
        with torch.no_grad():
            error = torch.maximum(highest - similarity, similarity - lowest).triu(1).amax()  # the diagonal is not read
            error = error + 2e-6  # the clamp of the root
            self._error = error if self._error is None else torch.maximum(self._error, error)
        return similarity

    def statistics(self) -> dict[str, torch.Tensor]:
        """similarity_error: how far S can be off at most, the largest of the rollout; nothing where it was exact."""
        return {} if self._error is None else {"similarity_error": self._error}


def _root_similarity(divergence: torch.Tensor) -> torch.Tensor:
    """1 - sqrt(JSD / ln 2) of JSD in nats; at 0 the gradient is 0 instead of infinite."""
    share = (divergence / math.log(2.0)).clamp(1e-12, 1.0)
    return 1.0 - share.sqrt()


def _relative_entropy(probs: torch.Tensor, middle: torch.Tensor) -> torch.Tensor:
    """Σ p ln(p / m) over the last axis, m > 0; the gradient is finite at p = 0, no rounding is left at p = m."""
    return (probs * (probs / middle).clamp_min(TINY).log()).sum(-1)


def _pair_divergence(probs: torch.Tensor) -> torch.Tensor:
    """Σ_v [p ln(p / m) + q ln(q / m)] / 2, m = (p + q) / 2, of every pair: (..., N, K) -> (..., N, N)."""
    paths = probs.shape[-2]
    left, right = torch.triu_indices(paths, paths, 1, device=probs.device)
    first, second = probs[..., left, :], probs[..., right, :]
    middle = ((first + second) / 2).clamp_min(TINY)
    divergence = (_relative_entropy(first, middle) + _relative_entropy(second, middle)) / 2
    pairs = probs.new_zeros(*probs.shape[:-1], paths)
    pairs[..., left, right] = divergence
    pairs[..., right, left] = divergence
    return pairs


def _exact_divergence(probs: torch.Tensor) -> torch.Tensor:
    """JSD in nats over the whole vocabulary, in chunks of it: no (..., N, N, V) at any time."""
    parts = [_pair_divergence(chunk) for chunk in probs.split(EXACT_CHUNK, dim=-1)]
    return torch.stack(parts).sum(0).clamp_min(0.0)


def _phi(share: torch.Tensor) -> torch.Tensor:
    """[(1 + ε) ln(1 + ε) + (1 - ε) ln(1 - ε)] / 2 where 1 - sqrt(1 - ε²) is `share`, in [0, 1]; see below."""
    contrast = (share * (2.0 - share)).clamp_min(1e-12).sqrt()
    sides = torch.stack([1.0 + contrast, 1.0 - contrast])
    return (sides * sides.clamp_min(TINY).log()).sum(0) / 2


def _bounded_divergence(probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """JSD in nats: (..., N, V) float32 -> lower bound, value in between and upper bound, (..., N, N) each.

    It is a sum over the support, the union of the likeliest tokens of the paths, and one over the rest. The latter is
    bounded by what one product of matrices gives: R = Σ m, m = (p + q) / 2, and H = Σ (m - sqrt(pq)) = R - Σ sqrt(pq).
    With ε = (p - q) / (p + q), a token adds m φ to JSD, φ = [(1 + ε) ln(1 + ε) + (1 - ε) ln(1 - ε)] / 2, and m h to H,
    h = 1 - sqrt(1 - ε²). With ε = tanh u, dφ/dh = u / sinh u falls as h rises: φ is concave in h, from 0 at h = 0 to
    ln 2 at h = 1. So φ >= h ln 2, and by Jensen's inequality Σ m φ(h) <= R φ(Σ m h / R): JSD of the rest lies between
    H ln 2 and R φ(H / R), which is at most H. It is also no less than that of the two masses left over, taken as one
    token each (the data processing inequality).

    Tokens whose |ε| is the same are at the upper bound, tokens of one path alone or of both alike at the lower. Softmax
    makes neither of them zero: where log p - log q is normal, the value is at the upper bound for a small H / R and
    falls to the middle and below; what is 1 - H / 2R of the way up is off by 0.016 of S at most.
    """
    ids = block_topk(probs.detach(), SUPPORT)[1].flatten(-2).sort(-1).values  # (..., N * SUPPORT), some of them twice
    first = torch.ones_like(ids, dtype=torch.bool)
    first[..., 1:] = ids[..., 1:] != ids[..., :-1]
    inside = probs.gather(-1, ids.unsqueeze(-2).expand(*probs.shape[:-1], -1)) * first.unsqueeze(-2)
    shared = _pair_divergence(inside)
    outside = root_gram(probs) - root_gram(inside)  # with the mass of each path on the diagonal
    mass = outside.diagonal(dim1=-2, dim2=-1).clamp_min(0.0)
    rest = (mass[..., :, None] + mass[..., None, :]) / 2
    apart = torch.stack([rest - outside, rest - (mass[..., :, None] * mass[..., None, :]).clamp_min(TINY).sqrt()])
    share = (apart / rest.clamp_min(TINY)).clamp(0.0, 1.0)  # H / R of the tokens, and of the two masses
    high, low = rest * _phi(share)
    share = share[0]
    low = torch.maximum(low, rest * share * math.log(2.0))
    high = torch.maximum(low, high)
    slack = rest.clamp_max(ROUNDING)  # neither bound moves by more than H does
    return shared + low - slack, shared + torch.lerp(high, low, share / 2), shared + high + slack
