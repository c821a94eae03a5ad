# SPDX-License-Identifier: Apache-2.0
"""The gates with parameters against their formulas in float64: values, gradients, options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import learnable_gates as reference
from reference.gates import distributions
from transformers.m3po.gating import create_gating_function
from transformers.m3po.gating.base import attention_weights
from transformers.m3po.thinking.thoughts import top_k_tokens

VOCAB, HIDDEN, SIZE = 40, 12, 8
KINDS = ("peaked", "flat", "one-hot", "uniform", "identical", "disjoint")
GATES = ("luong", "bahdanau")
SIZE_OF = {"luong": "rank", "bahdanau": "attention_dim"}
BOTH = pytest.mark.parametrize("projects", [False, True], ids=["vocabulary", "embeddings"])
EACH = pytest.mark.parametrize("name", GATES)

pytestmark = pytest.mark.usefixtures("one_thread")


def made(name: str, projects: bool, seed: int = 0, size: int = SIZE) -> tuple[Any, torch.nn.Embedding | None]:
    """A gate away from its start, no two parameters alike, and the embedding that it reads."""
    g = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"vocab_size": VOCAB, SIZE_OF[name]: size}
    table = None
    if projects:
        options |= {"project_embeddings": True, "hidden_size": HIDDEN}
        table = torch.nn.Embedding(VOCAB, HIDDEN)
    gate = create_gating_function(name, options)
    gate.start(g, table)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=g))
        if projects:
            gate.token_scale.mul_(1 + torch.rand(VOCAB, generator=g))
            gate.whitening.add_(0.1 * torch.randn(HIDDEN, HIDDEN, generator=g))
    return gate, table


def expected(name: str, gate: Any, probs: torch.Tensor, table: torch.nn.Embedding | None) -> torch.Tensor:
    """S of the reference for whole distributions (N, V), with gradient to copies of the parameters."""
    given = {key: value.detach().double() for key, value in gate.named_parameters()}
    behind = None if table is None else (gate.token_scale, table.weight, gate.whitening)
    return reference.similarity(name, given, probs, behind)


def off_diagonal(matrix: torch.Tensor) -> torch.Tensor:
    return matrix[..., ~torch.eye(matrix.shape[-1], dtype=torch.bool)]


def assert_similar(mine: torch.Tensor, wanted: torch.Tensor) -> None:
    assert mine.dtype == torch.float32 and torch.isfinite(mine).all()
    # Sums of r products of numbers about 1, and of v entries behind an embedding: some units of 6e-8 each.
    scale = max(1.0, float(wanted.detach().abs().amax()))
    torch.testing.assert_close(off_diagonal(mine).double(), off_diagonal(wanted), atol=5e-6 * scale, rtol=0)


def shuffled(probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All tokens of each distribution in an order of its own: ids int32 and their probabilities."""
    ids = torch.rand(probs.shape, generator=torch.Generator().manual_seed(1)).argsort(-1)
    return ids.int(), probs.gather(-1, ids)


@BOTH
@EACH
def test_similarity_is_the_formula(name: str, projects: bool) -> None:
    for kind in KINDS:
        for paths in (1, 2, 3, 8):
            check_similarity_is_the_formula(name, projects, kind, paths)


def check_similarity_is_the_formula(name: str, projects: bool, kind: str, paths: int) -> None:
    gate, table = made(name, projects)
    probs = distributions(kind, paths)
    mine = gate(probs, embed_tokens=table)
    assert mine.shape == (2, paths, paths)
    for group in range(2):
        assert_similar(mine[group], expected(name, gate, probs[group], table))


@BOTH
@EACH
def test_similarity_of_sixteen_paths_is_the_formula(name: str, projects: bool) -> None:
    gate, table = made(name, projects)
    probs = distributions("peaked", 16, groups=1)
    assert_similar(gate(probs, embed_tokens=table)[0], expected(name, gate, probs[0], table))


@EACH
def test_who_listens_and_who_is_heard_are_told_apart(name: str) -> None:
    gate, _ = made(name, False)
    probs = distributions("peaked", 3, groups=1)
    mine = gate(probs)
    assert (mine - mine.mT).abs().max() > 0.01, "S is symmetric, although the gate's two sides differ"


@BOTH
@EACH
def test_all_tokens_in_any_order_are_the_whole_distribution(name: str, projects: bool) -> None:
    for kind in KINDS:
        check_all_tokens_in_any_order_are_the_whole_distribution(name, projects, kind)


def check_all_tokens_in_any_order_are_the_whole_distribution(name: str, projects: bool, kind: str) -> None:
    gate, table = made(name, projects)
    probs = distributions(kind, 5)
    ids, shares = shuffled(probs)
    mine = gate(shares, ids=ids, embed_tokens=table)
    assert_similar(mine, gate(probs, embed_tokens=table).double())


@BOTH
@EACH
@pytest.mark.parametrize("top_k", [1, 5])
def test_the_likeliest_tokens_are_the_cut_distribution(name: str, projects: bool, top_k: int) -> None:
    gate, table = made(name, projects)
    probs = distributions("flat", 4, groups=1)[0]
    kept = top_k_tokens(probs, top_k, VOCAB)
    cut = reference.whole(kept.ids, kept.probs, VOCAB)
    assert (cut > 0).sum() == 4 * top_k and cut.sum(-1).max() < 0.9
    mine = gate(kept.probs[None], ids=kept.ids[None], embed_tokens=table)
    assert_similar(mine[0], expected(name, gate, cut, table))


@BOTH
@EACH
def test_a_token_that_is_listed_twice_counts_twice(name: str, projects: bool) -> None:
    gate, table = made(name, projects)
    ids = torch.tensor([[3, 7, 3], [0, 0, 0], [7, 1, 39]], dtype=torch.int32)  # as padding repeats token 0
    shares = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.1, 0.0], [0.25, 0.25, 0.5]])
    mine = gate(shares[None], ids=ids[None], embed_tokens=table)[0]
    assert_similar(mine, expected(name, gate, reference.whole(ids, shares, VOCAB), table))


@BOTH
@EACH
def test_leading_axes_are_taken_one_by_one(name: str, projects: bool) -> None:
    gate, table = made(name, projects)
    probs = torch.stack([distributions("peaked", 3), distributions("flat", 3)])  # (2, G, N, V)
    mine = gate(probs, embed_tokens=table)
    ids, shares = shuffled(probs)
    sparse = gate(shares, ids=ids, embed_tokens=table)
    assert mine.shape == sparse.shape == (2, 2, 3, 3)
    for first in range(2):
        for second in range(2):
            wanted = expected(name, gate, probs[first, second], table)
            assert_similar(mine[first, second], wanted)
            assert_similar(sparse[first, second], wanted)


@BOTH
@EACH
@pytest.mark.parametrize("sparse", [False, True])
def test_bf16_and_autocast_are_taken_in_float32(name: str, projects: bool, sparse: bool) -> None:
    gate, table = made(name, projects)
    probs = distributions("peaked", 4).to(torch.bfloat16)
    ids, shares = shuffled(probs) if sparse else (None, probs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine = gate(shares, ids=ids, embed_tokens=table)
    assert torch.equal(mine, gate(shares.float(), ids=ids, embed_tokens=table))
    for group in range(2):
        assert_similar(mine[group], expected(name, gate, probs[group].double(), table))


@EACH
def test_a_bf16_embedding_is_read_in_float32(name: str) -> None:
    gate, table = made(name, True)
    table = table.to(torch.bfloat16)
    probs = distributions("peaked", 4)
    ids, shares = shuffled(probs)
    for mine in (gate(probs, embed_tokens=table), gate(shares, ids=ids, embed_tokens=table)):
        for group in range(2):
            assert_similar(mine[group], expected(name, gate, probs[group], table))


@BOTH
@EACH
@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_of_the_similarity_and_of_the_weights_are_right(name: str, projects: bool, sparse: bool) -> None:
    gate, table = made(name, projects, size=4)
    gate = gate.double()
    probs = distributions("peaked", 4, groups=1).double()
    ids, shares = shuffled(probs) if sparse else (None, probs)
    names = [key for key, _ in gate.named_parameters()]
    active = torch.tensor([[True, False, True, True]])

    def similarity(*values: torch.Tensor) -> torch.Tensor:
        given = dict(zip(names, values, strict=True))
        rest = {"ids": ids, "embed_tokens": table}
        return torch.func.functional_call(
            Similar(gate), {f"gate.{key}": value for key, value in given.items()}, shares, rest
        )

    def weights(*values: torch.Tensor) -> torch.Tensor:
        return attention_weights(similarity(*values), active, 0.3)[0]

    values = [value.detach().clone().requires_grad_() for value in gate.parameters()]
    assert torch.autograd.gradcheck(similarity, values, fast_mode=True)
    assert torch.autograd.gradcheck(weights, values, fast_mode=True)
    (weights(*values) * torch.randn(4, 4)).sum().backward()
    assert all(value.grad.abs().max() > 1e-6 for value in values), "a parameter has no say in the weights"


class Similar(torch.nn.Module):
    """A gate by its `compute_similarity_matrix`, which leaves float64 as it is."""

    def __init__(self, gate: Any):
        super().__init__()
        self.gate = gate

    def forward(self, probs: torch.Tensor, ids: torch.Tensor | None, embed_tokens: Any) -> torch.Tensor:
        return self.gate.compute_similarity_matrix(probs, ids, embed_tokens)


@BOTH
@EACH
@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_to_the_distributions_are_right(name: str, projects: bool, sparse: bool) -> None:
    gate, table = made(name, projects)
    probs = distributions("flat", 3, groups=1)
    ids, shares = shuffled(probs) if sparse else (None, probs)
    shares = shares.detach().clone().requires_grad_()
    pull = torch.randn(3, 3)
    (gate(shares, ids=ids, embed_tokens=table)[0] * pull).sum().backward()
    wide = probs[0].double().requires_grad_()
    (expected(name, gate, wide, table) * pull).sum().backward()
    assert shares.grad is not None, "S does not reach the distributions"
    wanted = wide.grad if ids is None else wide.grad.gather(-1, ids[0].long())
    torch.testing.assert_close(shares.grad[0].double(), wanted, atol=1e-4, rtol=1e-4)


@BOTH
@EACH
def test_gradients_are_finite(name: str, projects: bool) -> None:
    for kind in KINDS:
        for active in ("all", "some", "one", "none"):
            check_gradients_are_finite(name, projects, kind, active)


def check_gradients_are_finite(name: str, projects: bool, kind: str, active: str) -> None:
    gate, table = made(name, projects)
    counts = {"all": 4, "some": 3, "one": 1, "none": 0}
    mask = (torch.arange(4) < counts[active]).expand(2, -1)
    probs = distributions(kind, 4).requires_grad_()
    weights = gate.compute_attention_weights(gate(probs, embed_tokens=table), mask)
    (weights * torch.rand(4, 4)).sum().backward()
    tensors = [weights, *[value.grad for value in (probs, *gate.parameters()) if value.grad is not None]]
    assert len(tensors) > len(list(gate.parameters()))
    assert all(torch.isfinite(tensor).all() for tensor in tensors)
    if counts[active] < 2:
        assert all((tensor == 0).all() for tensor in tensors)


@EACH
@pytest.mark.parametrize("sparse", [False, True])
def test_no_gradient_reaches_the_embedding(name: str, sparse: bool) -> None:
    gate, table = made(name, True)
    probs = distributions("peaked", 3)
    ids, shares = shuffled(probs) if sparse else (None, probs)
    similarity = gate(shares, ids=ids, embed_tokens=table)
    assert similarity.requires_grad
    similarity.sum().backward()
    assert table.weight.requires_grad and table.weight.grad is None
    assert all(value.grad is not None for value in gate.parameters())


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("luong", {}, "LuongAttentionGating needs vocab_size"),
        ("bahdanau", {}, "BahdanauAttentionGating needs vocab_size"),
        ("luong", {"vocab_size": 0}, "needs vocab_size"),
        ("luong", {"vocab_size": True}, "needs vocab_size"),
        ("luong", {"vocab_size": 40, "project_embeddings": True}, "needs hidden_size"),
        ("luong", {"vocab_size": 40, "rank": 0}, "rank=0 is no whole number above 0"),
        ("luong", {"vocab_size": 40, "rank": 2.0}, "rank=2.0 is no whole number"),
        ("luong", {"vocab_size": 40, "rank": None}, "rank=None is no whole number"),
        ("bahdanau", {"vocab_size": 40, "attention_dim": 0}, "attention_dim=0 is no whole number above 0"),
        ("bahdanau", {"vocab_size": 40, "attention_dim": 6}, "attention_dim=6 must be a multiple of 4"),
        ("luong", {"vocab_size": 40, "project_embeddings": "yes"}, "project_embeddings='yes' must be true or false"),
        ("luong", {"vocab_size": 40, "attention_dim": 8}, "no option 'attention_dim' for LuongAttentionGating"),
        ("bahdanau", {"vocab_size": 40, "rank": 8}, "no option 'rank' for BahdanauAttentionGating"),
    ],
)
def test_wrong_options_are_refused_in_one_line(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        create_gating_function(name, options)
    assert "\n" not in str(error.value)


@EACH
@pytest.mark.parametrize("sparse", [False, True])
def test_a_gate_behind_embeddings_asks_for_them(name: str, sparse: bool) -> None:
    gate, _ = made(name, True)
    ids, shares = shuffled(distributions("peaked", 3)) if sparse else (None, distributions("peaked", 3))
    with pytest.raises(ValueError, match="project_embeddings .* embed_tokens=") as error:
        gate(shares, ids=ids)
    assert "\n" not in str(error.value)
