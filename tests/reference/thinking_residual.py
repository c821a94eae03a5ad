# SPDX-License-Identifier: Apache-2.0
"""HRPO's residual gate and soft thought, slowly, in float64: arXiv 2505.18454, one path and one position at a time.

Written from the formulas and from nothing else, to have something to hold the vectorised code against. Three readings
of theirs: a thought is scaled by the norm of the *whole* distribution, whatever part of it is kept; an entry without an
embedding (the vocabulary of the logits may exceed the embedding matrix) can be among the k largest but adds nothing to
the vector; of equal weights the lower id is kept. Everything stays differentiable, so that autograd gives the reference
of the gradient too.

Indices: completion position j holds the token sampled from the distribution p_j; its thought h_j comes from that same
p_j, and its input (the residual of its embedding and h_j) influences p_{j+1}. The prompt's inputs are plain.
"""

from typing import NamedTuple

import torch
from reference import cross_path

C = 8.0
EPSILON = 1e-8

Bag = dict[int, torch.Tensor]


class Gate(NamedTuple):
    """The gate's parameters: weights (H, H) applied as `W e`, biases and Lambda (H,)."""

    w_r: torch.Tensor
    b_r: torch.Tensor
    w_i: torch.Tensor
    b_i: torch.Tensor
    lam: torch.Tensor


class Rollout(NamedTuple):
    """Inputs (B, T, H), log-probs (B, T), and `bags[row][position]`: the bag that was mixed in, None where plain."""

    inputs: torch.Tensor
    logps: torch.Tensor
    bags: list[list[Bag | None]]


def softplus(x: torch.Tensor) -> torch.Tensor:
    """log(1 + exp(x)), without the linear branch of torch's own (off by 2e-9 at its threshold)."""
    return torch.logaddexp(x, torch.zeros_like(x))


def initial_lambda(u: torch.Tensor) -> torch.Tensor:
    """Lambda, of u's shape, with exp(-c softplus(-Lambda)) = u, for u in (0, 1): -log(u^(-1/c) - 1)."""
    return -torch.log(torch.expm1(-torch.log(u.double()) / C))


def gate(
    embeds: torch.Tensor,
    thought: torch.Tensor,
    w_r: torch.Tensor,
    b_r: torch.Tensor,
    w_i: torch.Tensor,
    b_i: torch.Tensor,
    lam: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mixed input and the share a, each (H,), from one token's embedding (H,) and its soft thought (H,)."""
    e, h = embeds.double(), thought.double()
    r = 1 / (1 + torch.exp(-(w_r.double() @ e + b_r.double())))
    i = 1 / (1 + torch.exp(-(w_i.double() @ e + b_i.double())))
    a = torch.exp(-C * softplus(-lam.double()) * r)
    return a * e + torch.sqrt(1 - a * a + EPSILON) * (i * h), a


def distribution(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """The distribution (V,) that a token is sampled from, from the logits (V,)."""
    return torch.softmax(logits.double() / temperature, dim=-1)


def largest(bag: Bag, top_k: int) -> Bag:
    """The k largest entries of a bag (all of them for k = 0), by falling weight, then by rising id."""
    ids = sorted(bag, key=lambda k: (-bag[k].item(), k))
    return {k: bag[k] for k in (ids[:top_k] if top_k else ids)}


def soft_thought(probs: torch.Tensor, embedding: torch.Tensor, top_k: int = 0) -> torch.Tensor:
    """h (H,) from the distribution (V,) and the embedding matrix (V_emb, H): sum over the top-k of p_k E_k, / ||p||."""
    p = probs.double()
    kept = torch.zeros_like(p)
    ids = torch.sort(p.detach(), descending=True, stable=True).indices
    kept[ids[:top_k] if top_k else ids] = 1
    n = min(len(p), len(embedding))
    return (kept * p)[:n] @ embedding[:n].double() / (p * p).sum().sqrt()


def thought_bag(probs: torch.Tensor, top_k: int) -> Bag:
    """The soft thought as `{id: p_id / ||p||}` over the k largest entries of p (V,); k = 0 keeps all."""
    p = probs.double()
    norm = (p * p).sum().sqrt()
    return largest({k: p[k] / norm for k in range(len(p))}, top_k)


def blend_bags(
    bags: list[Bag], attention_row_per_path: list[list[torch.Tensor]], lambda_blend: float, top_k: int
) -> list[Bag]:
    """(1 - lambda) bag_i + lambda sum_j A_ij bag_j, equal ids merged, cut to the k largest (k = 0: not cut).

    A path whose row of A is all zero, that is one without an active peer, keeps its own bag.
    """
    blended = []
    for own, row in zip(bags, attention_row_per_path, strict=True):
        peers = [j for j, a in enumerate(row) if a.item() != 0]
        if not peers:
            blended.append(own)
            continue
        merged = {k: (1 - lambda_blend) * w for k, w in own.items()}
        for j in peers:
            for k, w in bags[j].items():
                merged[k] = merged.get(k, 0) + lambda_blend * row[j] * w
        blended.append(largest(merged, top_k))
    return blended


def bag_vector(bag: Bag, embedding: torch.Tensor) -> torch.Tensor:
    """sum w E[id], (H,); an id beyond the embedding matrix (V_emb, H) adds nothing."""
    total = torch.zeros(embedding.shape[1], dtype=torch.float64)
    for k, w in bag.items():
        if k < len(embedding):
            total = total + w * embedding[k].double()
    return total


def step_bags(
    probs: torch.Tensor, active: list[bool], groups: list[int], mode: str, top_k: int, lambda_blend: float, cross: float
) -> list[Bag | None]:
    """One step's bags from the distributions (B, V), None where not active; `cross` is the temperature of A."""
    if mode not in ("hrpo", "h3po"):
        raise ValueError(f"unknown mode {mode!r}")
    bags = [thought_bag(p, top_k) for p in probs]
    if mode == "h3po":
        rows = cross_path.weights(probs, active, groups, cross)
        bags = blend_bags(bags, rows, lambda_blend, top_k)
    return [bag if on else None for bag, on in zip(bags, active, strict=True)]


def completion_input(token: int, bag: Bag | None, embedding: torch.Tensor, parameters: Gate) -> torch.Tensor:
    """The input (H,) of one completion token: its plain embedding without a bag, else the residual of the two."""
    e = embedding[token].double()
    return e if bag is None else gate(e, bag_vector(bag, embedding), *parameters)[0]


def rollout_inputs(
    model,
    embedding: torch.Tensor,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    completion_ids: torch.Tensor,
    thinking: torch.Tensor,
    alive: torch.Tensor,
    groups: list[int],
    parameters: Gate,
    *,
    mode: str,
    temperature: float = 1.0,
    top_k: int = 0,
    lambda_blend: float = 0.0,
    cross_temperature: float = 0.1,
) -> Rollout:
    """Replay forced completions (B, T) after left-padded prompts (B, P), one full forward per step, no cache.

    `thinking[b, j]` and `alive[b, j]` (B, T) speak of the moment the input of token j is built: False in `thinking`
    for the token that completes the answer marker. A row is mixed, and heard by its peers, where both are true. The
    log-probs are those of the forced tokens at the sampling `temperature`, ended rows included. Bags keep their graph.
    """
    prompt = embedding[prompt_ids].double()
    batch, steps = completion_ids.shape
    inputs, logps, bags = [], [], [[] for _ in range(batch)]
    for t in range(steps):
        mask = torch.cat([prompt_mask.long(), torch.ones(batch, t, dtype=torch.long)], dim=1)
        embeds = torch.cat([prompt, *[x[:, None] for x in inputs]], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits[:, -1]
        probs = torch.stack([distribution(row, temperature) for row in logits])
        tokens = completion_ids[:, t].tolist()
        logps.append(torch.stack([torch.log(probs[b, token]) for b, token in enumerate(tokens)]))
        active = [bool(thinking[b, t]) and bool(alive[b, t]) for b in range(batch)]
        step = step_bags(probs, active, groups, mode, top_k, lambda_blend, cross_temperature)
        for b, bag in enumerate(step):
            bags[b].append(bag)
        inputs.append(torch.stack([completion_input(tokens[b], step[b], embedding, parameters) for b in range(batch)]))
    return Rollout(torch.stack(inputs, dim=1), torch.stack(logps, dim=1), bags)


def policy_logps(
    model,
    embedding: torch.Tensor,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    completion_ids: torch.Tensor,
    bags: list[list[Bag | None]],
    parameters: Gate,
    *,
    temperature: float = 1.0,
) -> list[torch.Tensor]:
    """Log-probs (T,) of each row's completion, one teacher-forced forward per row with the padding cut away.

    The bags are constants; the embedding matrix counts three times in the graph (prompt, token, thought).
    """
    result = []
    for b in range(len(completion_ids)):
        prompt = [k for k, m in zip(prompt_ids[b].tolist(), prompt_mask[b].tolist(), strict=True) if m]
        completion = completion_ids[b].tolist()
        embeds = [embedding[k].double() for k in prompt]
        for token, bag in zip(completion, bags[b], strict=True):
            constant = None if bag is None else {k: w.detach() for k, w in bag.items()}
            embeds.append(completion_input(token, constant, embedding, parameters))
        x = torch.stack(embeds)[None]
        positions = torch.arange(x.shape[1])[None]
        mask = torch.ones_like(positions)
        logits = model(inputs_embeds=x, attention_mask=mask, position_ids=positions).logits[0].double()
        logs = torch.log_softmax(logits / temperature, dim=-1)
        result.append(torch.stack([logs[len(prompt) + j - 1, token] for j, token in enumerate(completion)]))
    return result
