# SPDX-License-Identifier: Apache-2.0
"""The learnable gating functions and what is built on them in float64, pair by pair and path by path from the formulas.

Everything is differentiable in what requires grad. Distributions here are always whole, (N, V).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from reference import gates

Parameters = dict[str, torch.Tensor]
Similarity = Callable[[torch.Tensor], torch.Tensor]


def luong(x: torch.Tensor, y: torch.Tensor, given: Parameters) -> torch.Tensor:
    """x^T U V^T y."""
    return (x @ given["U"]) @ (y @ given["V"])


def bahdanau(x: torch.Tensor, y: torch.Tensor, given: Parameters) -> torch.Tensor:
    """sum_u v_u tanh(W1[:, u] . x + W2[:, u] . y + bias_u)."""
    total = torch.zeros((), dtype=torch.float64)
    for unit in range(len(given["v"])):
        inner = given["W1"][:, unit] @ x + given["W2"][:, unit] @ y + given["bias"][unit]
        total = total + given["v"][unit] * torch.tanh(inner)
    return total


PAIRS = {"luong": luong, "bahdanau": bahdanau}


def embedded(p: torch.Tensor, scale: torch.Tensor, table: torch.Tensor, whitening: torch.Tensor) -> torch.Tensor:
    """sum_v p_v scale_v E[v] W: (V,), (V,), (V, H), (H, H) -> (H,)."""
    mean = sum(p[v] * scale[v].double() * table[v].detach().double() for v in range(len(p)))
    return mean @ whitening.double()


def similarity(
    name: str, given: Parameters, probs: torch.Tensor, behind: Sequence[torch.Tensor] | None = None
) -> torch.Tensor:
    """S of every pair, the diagonal too: probs (N, V) -> (N, N); `behind` are the last arguments of `embedded`."""
    read = [p if behind is None else embedded(p, *behind) for p in probs.double()]
    return torch.stack([torch.stack([PAIRS[name](x, y, given) for y in read]) for x in read])


def dot(probs: torch.Tensor) -> torch.Tensor:
    """p . q of every pair."""
    return torch.stack([torch.stack([p @ q for q in probs.double()]) for p in probs.double()])


def cosine(probs: torch.Tensor) -> torch.Tensor:
    """p . q / (|p| |q|) of every pair."""
    wide = probs.double()
    return torch.stack([torch.stack([p @ q / (p @ p).sqrt() / (q @ q).sqrt() for q in wide]) for p in wide])


def whole(ids: torch.Tensor, probs: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """The distributions (N, V) that tokens and probabilities (N, K) speak of; a token listed twice counts twice."""
    found = torch.zeros(len(ids), vocabulary, dtype=torch.float64)
    for path in range(len(ids)):
        for token, share in zip(ids[path].tolist(), probs[path].tolist(), strict=True):
            found[path, token] += share
    return found


def attention(scores: torch.Tensor, active: Sequence[bool], temperature: float) -> torch.Tensor:
    """A of eq. 5 over the active peers: (N, N), N flags -> (N, N)."""
    paths = len(scores)
    rows = []
    for i in range(paths):
        peers = [j for j in range(paths) if j != i and active[i] and active[j]]
        row = [torch.zeros((), dtype=torch.float64)] * paths
        if peers:
            top = max(float(scores[i, j].detach()) for j in peers)
            powers = {j: torch.exp((scores[i, j] - top) / temperature) for j in peers}
            total = sum(powers.values())
            row = [powers[j] / total if j in powers else row[j] for j in range(paths)]
        rows.append(torch.stack(row))
    return torch.stack(rows)


def entropy(weights: np.ndarray) -> float:
    """-sum A ln A in nats, of all rows together."""
    return -sum(a * math.log(a) for a in weights.flatten().tolist() if a > 0)


def matched_temperature(scores: np.ndarray, active: np.ndarray, wanted: float) -> float | None:
    """T at which A (N, N) has this entropy, by bisection of ln T; None where no T has it."""

    def at(log_temperature: float) -> float:
        return entropy(gates.attention(scores, active, math.exp(log_temperature)))

    low, high = math.log(1e-12), math.log(1e6)
    if not at(low) + 1e-9 < wanted < at(high) - 1e-9:
        return None
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle) < wanted else (low, middle)
    return math.exp((low + high) / 2)


def members(groups: Sequence[int]) -> list[list[int]]:
    """The rows of each group, in the order of the batch."""
    return [[row for row, other in enumerate(groups) if other == group] for group in sorted(set(groups))]


def blended_log_probs(
    logits: torch.Tensor,
    groups: Sequence[int],
    thinking: torch.Tensor,
    similarity_of: Similarity,
    lambda_blend: float,
    temperature: float,
) -> torch.Tensor:
    """log p' of p'_i = (1 - lambda) p_i + lambda sum_j A_ij p_j: (B, T, V), position by position."""
    own = logits.double().log_softmax(-1)
    found = {}
    for position in range(logits.shape[1]):
        for rows in members(groups):
            probs = own[rows, position].exp()
            active = [bool(thinking[row, position]) for row in rows]
            weights = attention(similarity_of(probs), active, temperature)
            for i, row in enumerate(rows):
                found[row, position] = own[row, position]
                if lambda_blend > 0 and float(weights[i].detach().sum()) > 0:
                    peers = sum(weights[i, j] * probs[j] for j in range(len(rows)))
                    found[row, position] = torch.log((1 - lambda_blend) * probs[i] + lambda_blend * peers)
    return torch.stack(
        [torch.stack([found[row, position] for position in range(logits.shape[1])]) for row in range(len(groups))]
    )


def step_weights(
    bag_ids: torch.Tensor,
    bag_weights: torch.Tensor,
    ids: torch.Tensor,
    probs: torch.Tensor,
    norm: torch.Tensor,
    slots: torch.Tensor,
    temperature: torch.Tensor,
    active: Sequence[bool],
    groups: Sequence[int],
    similarity_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    lambda_blend: float,
    has_thoughts: bool,
) -> torch.Tensor:
    """The weights of one step's bags (B, K) for a gate and the tokens and peers that were recorded.

    Args:
        bag_ids, bag_weights: (B, K); ids, probs: (B, E); norm, temperature: (B,); slots: (B, P) into the own group.
        active: B flags.
        similarity_of: of ids and probabilities (N, E) of a group -> (N, N).
    """
    found: dict[int, torch.Tensor] = {}
    for rows in members(groups):
        weights = attention(
            similarity_of(ids[rows], probs[rows]), [active[row] for row in rows], float(temperature[rows[0]])
        )
        for i, row in enumerate(rows):
            heard = [(slot, weights[i, slot]) for slot in slots[row].tolist() if slot < len(rows)]
            total = sum((a for _, a in heard), torch.zeros((), dtype=torch.float64))
            zero = torch.zeros((), dtype=torch.float64)
            if float(total.detach()) == 0:  # keeps its own: no bag of tokens, or its own thought
                found[row] = bag_weights[row].double() if has_thoughts else torch.zeros(bag_ids.shape[1]).double()
                continue
            peers = {slot: a / total for slot, a in heard}  # the peers that were left out go to the others
            if not has_thoughts:
                entries = [torch.full((), 1 - lambda_blend, dtype=torch.float64)]
                entries += [lambda_blend * peers.get(slot, zero) for slot in slots[row].tolist()]
                found[row] = torch.stack(entries)
                continue
            merged: dict[int, torch.Tensor] = {}
            for share, other in [(1 - lambda_blend, row), *[(lambda_blend * a, rows[j]) for j, a in peers.items()]]:
                for token, p in zip(ids[other].tolist(), probs[other].tolist(), strict=True):
                    merged[token] = merged.get(token, zero) + share * p / float(norm[other])
            taken = zip(bag_ids[row].tolist(), bag_weights[row].tolist(), strict=True)
            found[row] = torch.stack([merged[token] if weight > 0 else zero for token, weight in taken])
    return torch.stack([found[row] for row in range(len(groups))])
