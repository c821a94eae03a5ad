# SPDX-License-Identifier: Apache-2.0
"""Where learnable gating functions start: near the dot product, different for each path, fixed by the seed."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from reference import learnable_gates as reference
from transformers.m3po.gating import create_gating_function

VOCAB, HIDDEN, GROUPS, PATHS = 5000, 256, 12, 8
GATES = ("luong", "bahdanau")
BOTH = pytest.mark.parametrize("projects", [False, True], ids=["vocabulary", "embeddings"])
EACH = pytest.mark.parametrize("name", GATES)

pytestmark = pytest.mark.usefixtures("one_thread")


@lru_cache(maxsize=1)
def probs() -> torch.Tensor:
    """(G, N, V): peaked distributions with a common part in each group, low ids likelier, as of a language model."""
    g = torch.Generator().manual_seed(11)
    shared = 3 * torch.randn(GROUPS, 1, VOCAB, generator=g)
    own = torch.randn(GROUPS, PATHS, VOCAB, generator=g)
    return (shared + own - torch.arange(1, VOCAB + 1).log()).softmax(-1)


@lru_cache(maxsize=1)
def table() -> torch.nn.Embedding:
    """Random rows with a strong part in common and columns of different size: far from orthogonal."""
    g = torch.Generator().manual_seed(12)
    with torch.random.fork_rng():
        found = torch.nn.Embedding(VOCAB, HIDDEN)
    rows = torch.randn(VOCAB, HIDDEN, generator=g) * (1 + 3 * torch.rand(HIDDEN, generator=g))
    found.weight.data = rows + 4 * torch.randn(HIDDEN, generator=g)
    return found


def started(name: str, projects: bool, seed: int, given: torch.nn.Embedding | None = None) -> Any:
    options: dict[str, Any] = {"vocab_size": VOCAB}
    if projects:
        options |= {"project_embeddings": True, "hidden_size": HIDDEN}
    gate = create_gating_function(name, options)
    gate.start(torch.Generator().manual_seed(seed), (given or table()) if projects else None)
    return gate


def off_diagonal(matrix: torch.Tensor) -> torch.Tensor:
    return matrix[..., ~torch.eye(matrix.shape[-1], dtype=torch.bool)]


def correlation(left: torch.Tensor, right: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([left.flatten().double(), right.flatten().double()]))[0, 1])


def dots() -> torch.Tensor:
    return torch.stack([reference.dot(group) for group in probs()])


@BOTH
@EACH
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_start_is_close_to_the_dot_product(name: str, projects: bool, seed: int) -> None:
    gate = started(name, projects, seed)
    with torch.no_grad():
        similarity = gate(probs(), embed_tokens=table())
    mine, wanted = off_diagonal(similarity), off_diagonal(dots())
    assert wanted.std() > 0.02 and wanted.max() < 0.95, "the distributions are too alike, or too different"
    assert correlation(mine, wanted) > 0.9
    inside = [correlation(a - a.mean(), b - b.mean()) for a, b in zip(mine, wanted, strict=True)]
    assert sum(inside) / GROUPS > 0.9, f"the groups are told apart, the paths of a group are not: {inside}"


@BOTH
@EACH
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_who_is_heard_depends_on_who_listens(name: str, projects: bool, seed: int) -> None:
    gate = started(name, projects, seed)
    with torch.no_grad():
        similarity = gate(probs(), embed_tokens=table())
        weights = gate.compute_attention_weights(similarity, torch.ones(GROUPS, PATHS, dtype=torch.bool))
    exact = torch.stack([reference.attention(group, [True] * PATHS, gate.temperature) for group in dots()])
    spread, wanted = _row_spread(weights.double()), _row_spread(exact)
    assert wanted > 0.02
    assert 0.85 * wanted < spread < 1.15 * wanted


def _row_spread(weights: torch.Tensor) -> float:
    """How much the rows of A differ in a column, the diagonal left out: mean standard deviation."""
    columns = [weights[:, [i for i in range(PATHS) if i != j], j] for j in range(PATHS)]
    return float(torch.stack(columns, 1).std(-1).mean())


@BOTH
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_is_linear_in_one_path_cancels_at_bahdanaus_start(projects: bool, seed: int) -> None:
    gate = started("bahdanau", projects, seed)
    slope = gate.v.double() * (1 - torch.tanh(gate.bias.double()).square())  # v tanh'(bias), of each unit
    for weight in (gate.W1.double(), gate.W2.double()):
        assert (weight @ slope).abs().max() < 1e-4 * (weight.abs() @ slope.abs()).max()
    # Cubed, nothing else is left of tanh either: its third derivative is 0 at the bias.
    bend = torch.tanh(gate.bias.double()).square()
    torch.testing.assert_close(bend, torch.full_like(bend, 1 / 3))


@BOTH
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bahdanaus_start_is_an_interaction_and_no_sum_of_two_sides(projects: bool, seed: int) -> None:
    """S_ij - S_i - S_j + S leaves nothing of f(p) + g(q), and all of p · q but its means."""
    gate = started("bahdanau", projects, seed)
    with torch.no_grad():
        mine = gate(probs(), embed_tokens=table()).double()
    exact = dots()
    of_columns = (mine.mean(-2) - mine.mean((-2, -1)).unsqueeze(-1)).std()
    wanted = (exact.mean(-2) - exact.mean((-2, -1)).unsqueeze(-1)).std()
    assert of_columns < 1.25 * wanted, "what all rows have in common outweighs what p · q has"
    left = mine - mine.mean(-1, keepdim=True) - mine.mean(-2, keepdim=True) + mine.mean((-2, -1), keepdim=True)
    right = exact - exact.mean(-1, keepdim=True) - exact.mean(-2, keepdim=True) + exact.mean((-2, -1), keepdim=True)
    assert correlation(left, right) > 0.9


@BOTH
@EACH
def test_the_start_follows_from_the_generator_alone(name: str, projects: bool) -> None:
    torch.manual_seed(1)
    first = started(name, projects, 5)
    torch.manual_seed(2)
    same, other = started(name, projects, 5), started(name, projects, 6)
    again = started(name, projects, 6)
    again.start(torch.Generator().manual_seed(5), table() if projects else None)
    before = torch.random.get_rng_state()
    first.start(torch.Generator().manual_seed(5), table() if projects else None)
    assert torch.equal(torch.random.get_rng_state(), before), "torch's own generator was drawn from"
    for key, value in first.state_dict().items():
        assert torch.equal(value, same.state_dict()[key]), key
        assert torch.equal(value, again.state_dict()[key]), key
    drawn_names = ["U", "V"] if name == "luong" else ["W1", "W2"]
    assert all(not torch.equal(getattr(first, key), getattr(other, key)) for key in drawn_names)


@BOTH
@EACH
def test_a_fresh_gate_has_been_started(name: str, projects: bool) -> None:
    options: dict[str, Any] = {
        "vocab_size": 300,
        **({"project_embeddings": True, "hidden_size": 8} if projects else {}),
    }
    gate = create_gating_function(name, options)
    for key, value in gate.named_parameters():
        assert torch.isfinite(value).all() and value.abs().min() > 0, key


def test_luong_starts_with_both_sides_alike_in_memory_of_their_own() -> None:
    gate = started("luong", False, 0)
    assert torch.equal(gate.U, gate.V) and gate.U.data_ptr() != gate.V.data_ptr()


@EACH
def test_a_bf16_embedding_gives_nearly_the_same_start(name: str) -> None:
    rounded = torch.nn.Embedding(VOCAB, HIDDEN, dtype=torch.bfloat16)
    rounded.weight.data = table().weight.data.to(torch.bfloat16)
    gate = started(name, True, 0, rounded)
    with torch.no_grad():
        similarity = gate(probs(), embed_tokens=rounded)
    assert correlation(off_diagonal(similarity), off_diagonal(dots())) > 0.9
