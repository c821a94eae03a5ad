# SPDX-License-Identifier: Apache-2.0
"""Hyper-connections, slowly, in float64: one position and one entry at a time, written from the equations.

Equations 3 and 7-9 of arXiv 2512.24880 with row normalisation before column normalisation, H_res applied transposed,
H_pre shifted to 1/S and the start of `hyper_connections/connections.py`; permutations weighed by a softmax (mHC-lite).

Nothing here needs torch.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


def sinkhorn(logits: Array, rounds: int, tau: float = 1.0) -> Array:
    """One matrix (S, S): rows, then columns, on logarithms all the way."""
    size = len(logits)
    log = np.array(logits, dtype=np.float64) / tau
    for _ in range(rounds):
        for i in range(size):
            log[i] -= np.logaddexp.reduce(log[i])
        for j in range(size):
            log[:, j] -= np.logaddexp.reduce(log[:, j])
    return np.exp(log)


def birkhoff(logits: Array, streams: int) -> Array:
    """Σ_p softmax(logits)_p P_p, the permutations in lexicographic order; P sends i to p(i)."""
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()
    total = np.zeros((streams, streams))
    for weight, order in zip(weights, itertools.permutations(range(streams)), strict=True):
        for i in range(streams):
            total[i, order[i]] += weight
    return total


def matrices(
    streams: Array, phi: Array, bias: Array, alpha: Array, eps: float, rounds: int, tau: float, kind: str
) -> tuple[Array, Array, Array]:
    """H_res (S, S), H_pre (S) and H_post (S) of one position's streams (S, H)."""
    size = len(streams)
    flat = streams.reshape(-1)
    normed = flat / math.sqrt(float(np.mean(flat**2)) + eps)
    raw = [float(np.dot(row, normed)) for row in phi]
    part = [0] * size + [1] * size + [2] * (len(phi) - 2 * size)
    logits = np.array([alpha[p] * value + b for p, value, b in zip(part, raw, bias, strict=True)])
    shift = math.log(size - 1) if size > 1 else -40.0
    pre = np.array([1 / (1 + math.exp(shift - value)) for value in logits[:size]])
    post = np.array([2 / (1 + math.exp(-value)) for value in logits[size : 2 * size]])
    routes = logits[2 * size :]
    mixing = birkhoff(routes, size) if kind == "birkhoff" else sinkhorn(routes.reshape(size, size), rounds, tau)
    return mixing, pre, post


def gated(mixing: Array, gate: float) -> Array:
    """Between the identity and H_res."""
    return (1 - gate) * np.eye(len(mixing)) + gate * mixing


def read(streams: Array, pre: Array) -> Array:
    """Σ_i H_pre[i] x_i."""
    return np.sum([weight * stream for weight, stream in zip(pre, streams, strict=True)], axis=0)


def write(streams: Array, output: Array, mixing: Array, post: Array) -> Array:
    """x'_j = Σ_i H_res[i, j] x_i + H_post[j] y."""
    size = len(streams)
    rows = [sum(mixing[i, j] * streams[i] for i in range(size)) + post[j] * output for j in range(size)]
    return np.array(rows)
