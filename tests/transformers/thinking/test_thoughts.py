# SPDX-License-Identifier: Apache-2.0
"""Soft thoughts as bags, and their blend across a group, against the float64 reference."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from reference import cross_path, thinking_residual
from reference.gated import assert_same_bag, bag_of
from transformers.m3po import PathGroups
from transformers.m3po.bag_vectors import bag_vectors
from transformers.m3po.thinking.bags import select_peers
from transformers.m3po.thinking.interaction import path_attention
from transformers.m3po.thinking.thoughts import blend_thoughts, thought_bags

VOCAB, HIDDEN = 23, 6
# fp32 weights are at most 1 and carry the rounding of a norm and of a division: about two units of 6e-8 each, and a
# vector adds up to 23 of them times embeddings of size about 3.
WEIGHT, VECTOR = 5e-7, 1e-5


def distributions(kind, rows=5, vocab=VOCAB, seed=0):
    g = torch.Generator().manual_seed(seed)
    if kind == "flat":
        return torch.full((rows, vocab), 1 / vocab)
    if kind == "one-hot":
        return torch.eye(vocab)[torch.randperm(vocab, generator=g)[:rows]]
    return (torch.randn(rows, vocab, generator=g) * 2).softmax(-1)


@pytest.mark.parametrize("kind", ["random", "one-hot", "flat"])
@pytest.mark.parametrize("rows_of_matrix", [VOCAB - 7, VOCAB, VOCAB + 7])
@pytest.mark.parametrize("top_k", [0, 1, 4, VOCAB, VOCAB + 9])
def test_a_thought_is_that_of_the_reference(top_k, rows_of_matrix, kind):
    probs, matrix = distributions(kind), torch.nn.Embedding(rows_of_matrix, HIDDEN)
    ids, weights = thought_bags(probs, top_k, rows_of_matrix)
    entries = min(top_k or VOCAB, VOCAB)
    assert ids.shape == weights.shape == (5, entries)
    assert (ids.dtype, weights.dtype) == (torch.int32, torch.float32)
    assert ids.min() >= 0 and ids.max() < rows_of_matrix, "an id without an embedding"
    if kind == "flat" and entries < VOCAB:  # which of equal tokens are kept is not told; how much they weigh is
        expected = torch.full_like(weights, VOCAB**-0.5)
        torch.testing.assert_close(weights, torch.where(weights > 0, expected, 0.0), atol=WEIGHT, rtol=0)
        return
    vectors = bag_vectors(matrix, ids[:, None], weights[:, None], HIDDEN)[:, 0]
    for row, p in enumerate(probs):
        bag = thinking_residual.thought_bag(p, top_k)
        with_embedding = {k: w for k, w in bag.items() if k < rows_of_matrix}
        assert_same_bag(bag_of(ids[row], weights[row]), with_embedding, WEIGHT)
        expected = thinking_residual.soft_thought(p, matrix.weight, top_k)
        torch.testing.assert_close(vectors[row].double(), expected, atol=VECTOR, rtol=0)


@pytest.mark.parametrize("top_k", [0, 4])
def test_the_norm_is_that_of_the_whole_distribution(top_k):
    probs = distributions("random")
    _, weights = thought_bags(probs, top_k, VOCAB - 7)
    whole = thought_bags(probs, 0, VOCAB)[1]
    torch.testing.assert_close(whole.square().sum(-1), torch.ones(5))
    assert (weights.square().sum(-1) < 0.9999).all(), "the kept part was scaled up"


def test_a_vocabulary_of_real_size_keeps_its_precision():
    probs = (torch.randn(2, 151_936, generator=torch.Generator().manual_seed(1)) * 2).softmax(-1)
    ids, weights = thought_bags(probs, 64, 151_936)
    for row in range(2):
        p = probs[row].double()
        expected, kept = p.topk(64)
        assert torch.equal(ids[row].long(), kept)
        # The norm is a plain fp32 sum of 150,000 squares.
        torch.testing.assert_close(weights[row].double(), expected / p.norm(), atol=0, rtol=5e-5)


def random_group(seed, vocab=VOCAB, sharpness=2.0, active_share=0.75):
    """Distributions of uneven groups in shuffled order, some paths not active; one group of one."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 5, (2,), generator=g).tolist() + [3, 1]
    groups = torch.arange(4).repeat_interleave(torch.tensor(sizes)) * 5 - 3
    groups = groups[torch.randperm(len(groups), generator=g)]
    active = torch.rand(len(groups), generator=g) < active_share
    probs = (torch.randn(len(groups), vocab, generator=g) * sharpness).softmax(-1)
    return probs, groups, active


def blended(probs, groups, active, top_k, lambda_blend, temperature=0.2, matrix=VOCAB, peers_kept=None):
    """Own bags, blended bags, and A (B, B) as the blend got it."""
    paths = PathGroups(groups)
    attention = path_attention(probs, active, paths, temperature).weights
    peers, rows, _, _ = select_peers(attention, paths, peers_kept)
    own = thought_bags(probs, top_k, matrix)
    a = torch.zeros(len(probs), len(probs)).scatter_add(1, rows, peers)
    return own, blend_thoughts(*own, peers, rows, lambda_blend), a


def references(probs, a, top_k, lambda_blend, matrix=VOCAB):
    """The reference's blend for these weights A; ids without an embedding are left out before, as from every bag."""
    bags = [thinking_residual.thought_bag(p, top_k) for p in probs]
    bags = [{k: w for k, w in bag.items() if k < matrix} for bag in bags]
    return thinking_residual.blend_bags(bags, [list(row.double()) for row in a], lambda_blend, top_k)


@given(
    seed=st.integers(0, 10**6),
    top_k=st.sampled_from([0, 1, 3, 8, VOCAB + 2]),
    lambda_blend=st.sampled_from([0.1, 0.5, 1.0]),
    matrix=st.sampled_from([VOCAB - 7, VOCAB, VOCAB + 5]),
    peers_kept=st.sampled_from([None, 1]),
)
@example(seed=1, top_k=3, lambda_blend=0.5, matrix=VOCAB, peers_kept=None)
@settings(max_examples=25)
def test_the_blend_is_that_of_the_reference(seed, top_k, lambda_blend, matrix, peers_kept):
    probs, groups, active = random_group(seed)
    own, (ids, weights), a = blended(probs, groups, active, top_k, lambda_blend, matrix=matrix, peers_kept=peers_kept)
    assert ids.shape == own[0].shape and (ids.dtype, weights.dtype) == (torch.int32, torch.float32)
    for row, bag in enumerate(references(probs, a, top_k, lambda_blend, matrix)):
        assert_same_bag(bag_of(ids[row], weights[row]), bag, WEIGHT)
        kept = ids[row][weights[row] > 0].tolist()
        assert len(kept) == len(set(kept)), "equal ids were not merged"


def test_the_whole_chain_equals_the_formulas_for_whole_distributions():
    """A from the reference as well: what a path gets is the blend of the vectors."""
    for seed in range(4):
        probs, groups, active = random_group(seed)
        matrix = torch.nn.Embedding(VOCAB, HIDDEN)
        _, (ids, weights), _ = blended(probs, groups, active, 0, 0.4)
        thoughts = torch.stack([thinking_residual.soft_thought(p, matrix.weight) for p in probs])
        args = active.tolist(), groups.tolist()
        rows = cross_path.weights(probs, *args, 0.2)
        expected = cross_path.blend(thoughts, rows, *args, 0.4)
        mine = bag_vectors(matrix, ids[:, None], weights[:, None], HIDDEN)[:, 0]
        # The cosine of fp32 distributions is off by 1e-6 and is divided by the temperature 0.2.
        torch.testing.assert_close(mine.double(), expected, atol=4e-5, rtol=0)


def test_a_path_that_hears_nobody_keeps_its_bag_bit_for_bit():
    silent = heard = 0
    for seed in range(12):
        probs, groups, active = random_group(seed, active_share=0.5)
        (own_ids, own_weights), (ids, weights), a = blended(probs, groups, active, 4, 0.7)
        alone = a.sum(-1) == 0
        assert torch.equal(ids[alone], own_ids[alone]) and torch.equal(weights[alone], own_weights[alone])
        changed = (weights != own_weights).any(-1)
        assert torch.equal(changed, ~alone)
        silent, heard = silent + int(alone.sum()), heard + int((~alone).sum())
    assert silent > 10 and heard > 10, "a poor case"


def test_weights_of_equal_ids_add_up_and_the_largest_sums_are_kept():
    ids = torch.tensor([[3, 5, 8], [5, 9, 3]], dtype=torch.int32)
    weights = torch.tensor([[0.8, 0.4, 0.2], [0.9, 0.3, 0.1]])
    peers, rows = torch.tensor([[1.0], [0.0]]), torch.tensor([[1], [0]])
    mixed_ids, mixed = blend_thoughts(ids, weights, peers, rows, 0.5)
    # 3: .4 + .05, 5: .2 + .45, 8: .1, 9: .15, the three largest in order.
    assert mixed_ids[0].tolist() == [5, 3, 9]
    torch.testing.assert_close(mixed[0], torch.tensor([0.65, 0.45, 0.15]))
    assert torch.equal(mixed_ids[1], ids[1]) and torch.equal(mixed[1], weights[1])


def test_paths_with_the_same_thought_keep_it():
    ids = torch.tensor([[4, 2, 9]], dtype=torch.int32).expand(3, -1)
    weights = torch.tensor([[0.7, 0.6, 0.3]]).expand(3, -1)
    rows = torch.tensor([[1, 2], [2, 0], [0, 1]])
    mixed_ids, mixed = blend_thoughts(ids, weights, torch.full((3, 2), 0.5), rows, 0.6)
    assert torch.equal(mixed_ids, ids)
    torch.testing.assert_close(mixed, weights)


def test_at_lambda_one_a_path_thinks_what_its_peer_thinks():
    probs = distributions("random", rows=2)
    own, (ids, weights), _ = blended(probs, torch.zeros(2).long(), torch.ones(2).bool(), 4, 1.0)
    assert torch.equal(ids, own[0].flip(0))
    torch.testing.assert_close(weights, own[1].flip(0), atol=WEIGHT, rtol=0)


def test_gradient_reaches_the_weights_of_the_peers_and_is_finite_where_there_are_none():
    ids = torch.tensor([[3, 5], [5, 9], [1, 2]], dtype=torch.int32)
    weights = torch.rand(3, 2)
    peers = torch.tensor([[1.0], [1.0], [0.0]], requires_grad=True)
    _, mixed = blend_thoughts(ids, weights, peers, torch.tensor([[1], [0], [0]]), 0.5)
    mixed.square().sum().backward()
    assert peers.grad.isfinite().all() and (peers.grad[:2] > 0).all() and peers.grad[2] == 0
