# SPDX-License-Identifier: Apache-2.0
"""The parameter-free gates and their attention in float64, pair by pair from the formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

Pair = Callable[[np.ndarray, np.ndarray], float]


def cosine(p: np.ndarray, q: np.ndarray) -> float:
    return float(p @ q / (np.linalg.norm(p) * np.linalg.norm(q)))


def raw_dot(p: np.ndarray, q: np.ndarray) -> float:
    return float(p @ q)


def scaled_dot(p: np.ndarray, q: np.ndarray) -> float:
    return float(p @ q) / math.sqrt(len(p))


def bhattacharyya(p: np.ndarray, q: np.ndarray) -> float:
    return float(sum(math.sqrt(x * y) for x, y in zip(p, q, strict=True)))


def kl_divergence(p: np.ndarray, q: np.ndarray) -> float:
    def relative(x: np.ndarray, y: np.ndarray) -> float:
        return sum(a * math.log(a / b) for a, b in zip(x, y, strict=True) if a > 0)

    middle = (p + q) / 2
    divergence = (relative(p, middle) + relative(q, middle)) / 2
    return 1.0 - math.sqrt(max(divergence, 0.0) / math.log(2.0))


GATES: dict[str, Pair] = {
    "baseline": cosine,
    "raw_dot": raw_dot,
    "scaled_dot": scaled_dot,
    "bhattacharyya": bhattacharyya,
    "kl_divergence": kl_divergence,
}


def similarity(gate: str, probs: np.ndarray) -> np.ndarray:
    """S of every pair but the diagonal, which is 0: probs (N, V) -> (N, N)."""
    paths = len(probs)
    found = np.zeros((paths, paths))
    for i in range(paths):
        for j in range(paths):
            if i != j:
                found[i, j] = GATES[gate](probs[i], probs[j])
    return found


def attention(scores: np.ndarray, active: np.ndarray, temperature: float) -> np.ndarray:
    """A of eq. 5 over the active peers: scores (N, N), active (N,) bool -> (N, N)."""
    weights = np.zeros_like(scores)
    for i in range(len(scores)):
        peers = [j for j in range(len(scores)) if j != i and active[j]]
        if not active[i] or not peers:
            continue
        top = max(scores[i, j] for j in peers)
        powers = [math.exp((scores[i, j] - top) / temperature) for j in peers]
        for j, power in zip(peers, powers, strict=True):
            weights[i, j] = power / sum(powers)
    return weights


def distributions(kind: str, paths: int, vocabulary: int = 40, groups: int = 2) -> torch.Tensor:
    """(G, N, V) float32."""
    g = torch.Generator().manual_seed(paths)
    shape = (groups, paths, vocabulary)
    if kind in ("peaked", "flat"):
        return (torch.randn(shape, generator=g) * (6 if kind == "peaked" else 0.5)).softmax(-1)
    if kind == "one-hot":
        return torch.nn.functional.one_hot(torch.randint(4, shape[:2], generator=g), vocabulary).float()
    if kind == "uniform":
        return torch.full(shape, 1 / vocabulary)
    if kind == "identical":
        return torch.randn(groups, 1, vocabulary, generator=g).softmax(-1).expand(shape).contiguous()
    probs = torch.zeros(shape)  # each path on tokens of its own
    for path in range(paths):
        probs[:, path, 2 * path : 2 * path + 2] = 0.5
    return probs
