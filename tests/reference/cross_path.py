# SPDX-License-Identifier: Apache-2.0
"""Cross-path interaction, slowly, in float64: the formulas of arXiv 2512.01485, eq. 2-6, one pair of paths at a time.

Written from the paper's formulas and from nothing else, to have something to hold the vectorised code against. It
departs from the paper in two places: a path outside the thinking phase is left out of the sums (the paper's literal
similarity 0 would still give it the weight exp(0)), and a path without an active peer keeps its own embedding (the
paper's sum over no peers has no value). Everything stays differentiable, so that autograd gives the reference of the
gradient too.
"""

import math

import torch


def active_peers(i: int, thinking: list[bool], groups: list[int]) -> list[int]:
    """The other thinking paths of path `i`'s group; none if `i` itself is not thinking."""
    if not thinking[i]:
        return []
    return [j for j in range(len(groups)) if j != i and thinking[j] and groups[j] == groups[i]]


def similarity(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Eq. 3: the cosine of two distributions (V,), float64."""
    return (p * q).sum() / ((p * p).sum().sqrt() * (q * q).sum().sqrt())


def weights(
    probs: torch.Tensor, thinking: list[bool], groups: list[int], temperature: float, gate=similarity
) -> list[list[torch.Tensor]]:
    """Eq. 4-5: A (B, B) as rows of float64 scalars, from probs (B, V)."""
    rows = []
    for i in range(len(groups)):
        row = [torch.zeros((), dtype=torch.float64) for _ in groups]
        peers = active_peers(i, thinking, groups)
        exponentials = {j: torch.exp(gate(probs[i].double(), probs[j].double()) / temperature) for j in peers}
        for j in peers:
            row[j] = exponentials[j] / sum(exponentials.values())
        rows.append(row)
    return rows


def blend(
    embeds: torch.Tensor, rows: list[list[torch.Tensor]], thinking: list[bool], groups: list[int], lambda_blend: float
) -> torch.Tensor:
    """Eq. 6 and 2: the thinking inputs (B, H), float64, from embeds (B, H) and the weights A."""
    blended = []
    for i in range(len(groups)):
        own = embeds[i].double()
        peers = active_peers(i, thinking, groups)
        if peers:
            context = sum(rows[i][j] * embeds[j].double() for j in peers)
            own = (1 - lambda_blend) * own + lambda_blend * context
        blended.append(own)
    return torch.stack(blended)


def interaction(embeds, probs, thinking, groups, lambda_blend, temperature):
    """Eq. 2-6 in one: `(blended, weights)`, float64, (B, H) and (B, B)."""
    rows = weights(probs, thinking, groups, temperature)
    return blend(embeds, rows, thinking, groups, lambda_blend), torch.stack([torch.stack(row) for row in rows])


def bag_vector(ids: list[int], bag: list[float], embedding: torch.Tensor) -> torch.Tensor:
    """One bag's vector (H,), float64: the sum of `w_k E[id_k]` over its entries; the weight 0 marks an unused entry."""
    terms = [w * embedding[k].double() for k, w in zip(ids, bag, strict=True) if w != 0]
    return sum(terms, torch.zeros(embedding.shape[1], dtype=torch.float64))


def mean_attention_entropy(rows: torch.Tensor) -> float:
    """Mean over the rows that listen to a peer of `-sum A log A`, in nats; rows (B, B)."""
    entropies = [-sum(a * math.log(a) for a in row if a > 0) for row in rows.tolist() if sum(row) > 0]
    return sum(entropies) / len(entropies)
