# SPDX-License-Identifier: Apache-2.0
"""The gates with parameters in float64, pair by pair from the formulas (seeds 3 and 4, E17)."""

from __future__ import annotations

from typing import Any

import numpy as np


def numbers(gate: Any, name: str) -> np.ndarray:
    """A parameter or buffer of a gate in float64."""
    return getattr(gate, name).detach().double().numpy()


def read(gate: Any, probs: np.ndarray, embedding: np.ndarray) -> np.ndarray:
    """What a gate's matrices are laid on: p itself or, behind the embedding matrix, Σ_v p_v s_v E[v] W."""
    if not gate.project_embeddings:
        return probs
    mean = (probs * numbers(gate, "token_scale")) @ embedding
    return mean @ numbers(gate, "whitening")


def luong(gate: Any, p: np.ndarray, q: np.ndarray) -> float:
    return float((p @ numbers(gate, "U")) @ (q @ numbers(gate, "V")))


def bahdanau(gate: Any, p: np.ndarray, q: np.ndarray) -> float:
    units = np.tanh(p @ numbers(gate, "W1") + q @ numbers(gate, "W2") + numbers(gate, "bias"))
    return float(units @ numbers(gate, "v"))


GATES = {"luong": luong, "bahdanau": bahdanau}


def similarity(name: str, gate: Any, probs: np.ndarray, entries: int, embedding: np.ndarray) -> np.ndarray:
    """S of every pair but the diagonal, which is 0, of the `entries` likeliest tokens: probs (N, V) -> (N, N)."""
    kept = [np.where(p >= np.sort(p)[-entries], p, 0.0) for p in probs]
    paths = [read(gate, p, embedding) for p in kept]
    found = np.zeros((len(paths), len(paths)))
    for i, first in enumerate(paths):
        for j, second in enumerate(paths):
            if i != j:
                found[i, j] = GATES[name](gate, first, second)
    return found
