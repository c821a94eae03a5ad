# SPDX-License-Identifier: Apache-2.0
"""Bags: what `cross_path_bags` writes down, `mix_bags` turns back into the blend of eq. 2 and 6."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from reference import cross_path
from transformers.m3po import PathGroups, apply_cross_path_interaction, bag_vectors
from transformers.m3po.thinking.bags import cross_path_bags, select_peers
from transformers.m3po.thinking.inputs import mix_bags, mix_thinking_inputs
from transformers.m3po.thinking.interaction import path_attention

VOCAB, HIDDEN = 60, 8
GROUPS = torch.tensor([3, 3, 8, 3, 8, 5, 3])
THINKING = torch.tensor([1, 1, 1, 0, 1, 1, 1], dtype=torch.bool)


def step(lambda_blend=0.3, top_k=None, groups=GROUPS, thinking=THINKING):
    """One decoding step: the sampled tokens, their distributions, the bags (B, K)."""
    probs = (torch.randn(len(groups), VOCAB) * 2).softmax(-1)
    tokens = probs.multinomial(1).squeeze(-1)
    paths = PathGroups(groups)
    peers = select_peers(path_attention(probs, thinking, paths, 0.1).weights, paths, top_k)
    return tokens, probs, *cross_path_bags(tokens, peers.weights, peers.rows, lambda_blend)


def random_bags(batch=3, positions=5, entries=4):
    """Random bags (B, T, K), some positions without one."""
    ids = torch.randint(0, VOCAB, (batch, positions, entries), dtype=torch.int32)
    weights = torch.rand(batch, positions, entries) * (torch.rand(batch, positions, 1) < 0.6)
    weights[0, 0], weights[1, 0] = 0.0, 0.25
    return ids, weights


def expected_mix(embedding, own, ids, weights):
    """The float64 reference of `mix_bags` for bags at every position: (B, T, H)."""
    rows = []
    for b in range(ids.shape[0]):
        for t in range(ids.shape[1]):
            bag = weights[b, t].tolist()
            vector = cross_path.bag_vector(ids[b, t].tolist(), bag, embedding) if any(bag) else own[b, t].double()
            rows.append(vector)
    return torch.stack(rows).view(*ids.shape[:2], -1)


@pytest.mark.parametrize("lambda_blend", [0.1, 0.5, 1.0])
def test_bag_and_mix_reproduce_the_interaction_and_the_formulas(lambda_blend):
    embedding = torch.nn.Embedding(VOCAB, HIDDEN)
    tokens, probs, ids, weights = step(lambda_blend)
    mixed = mix_bags(embedding, embedding(tokens)[:, None], ids[:, None], weights[:, None])[:, 0]
    blended, _ = apply_cross_path_interaction(
        embedding(tokens), probs, THINKING, group_ids=GROUPS, lambda_blend=lambda_blend
    )
    expected, _ = cross_path.interaction(
        embedding(tokens), probs, THINKING.tolist(), GROUPS.tolist(), lambda_blend, 0.1
    )
    torch.testing.assert_close(mixed, blended, atol=1e-6, rtol=0)
    torch.testing.assert_close(mixed.double(), expected, atol=4e-5, rtol=0)
    assert torch.equal(mixed[[3, 5]], embedding(tokens)[[3, 5]]), "a path that hears nobody was touched"


def test_the_first_entry_is_the_own_token_with_one_minus_lambda_and_the_bag_sums_to_one():
    tokens, _, ids, weights = step(0.3)
    hears = torch.tensor([True, True, True, False, True, False, True])
    assert torch.equal(ids[:, 0], tokens.int())
    torch.testing.assert_close(weights[hears, 0], torch.full((5,), 0.7))
    torch.testing.assert_close(weights.sum(-1), hears.float())


def test_the_bag_of_eight_paths_takes_64_bytes_per_token():
    _, _, ids, weights = step(groups=torch.arange(16) // 8, thinking=torch.ones(16).bool())
    assert (ids.dtype, weights.dtype) == (torch.int32, torch.float32)
    assert ids[0].nbytes + weights[0].nbytes == 64


@pytest.mark.parametrize("top_k", [1, 2])
def test_top_k_keeps_the_heaviest_peers_and_scales_them_to_one(top_k):
    tokens, probs, ids, weights = step(0.3, top_k)
    rows = cross_path.weights(probs, THINKING.tolist(), GROUPS.tolist(), 0.1)
    assert ids.shape == weights.shape == (len(GROUPS), top_k + 1)
    for i, row in enumerate(rows):
        heaviest = sorted((j for j in range(len(row)) if row[j] > 0), key=lambda j, row=row: -row[j])[:top_k]
        total = sum(row[j] for j in heaviest)
        expected = sorted((0.3 * float(row[j] / total), int(tokens[j])) for j in heaviest)
        kept = sorted((w, k) for w, k in zip(weights[i, 1:].tolist(), ids[i, 1:].tolist(), strict=True) if w > 0)
        assert [k for _, k in kept] == [k for _, k in expected]
        torch.testing.assert_close([w for w, _ in kept], [w for w, _ in expected], atol=2e-5, rtol=0)


def test_top_k_larger_than_the_group_keeps_everyone():
    torch.manual_seed(4)
    everyone = step(0.3)
    torch.manual_seed(4)
    capped = step(0.3, top_k=50)
    assert all(torch.equal(a, b) for a, b in zip(everyone, capped, strict=True))
    assert capped[2].shape == (7, 4) and step(0.3, top_k=2)[2].shape == (7, 3)


def test_mixing_in_chunks_over_the_positions_changes_no_bit(monkeypatch):
    embedding = torch.nn.Embedding(VOCAB, HIDDEN)
    ids, weights = random_bags(positions=7)
    inputs = torch.randn(3, 9, HIDDEN)
    calls = []

    def counted(x):
        calls.append(x.shape)
        return embedding(x)

    whole = mix_bags(counted, inputs, ids, weights)
    monkeypatch.setattr(bag_vectors, "MIX_CHUNK_ELEMENTS", 3 * 4 * HIDDEN * 2)
    chunked = mix_bags(counted, inputs, ids, weights)
    assert [shape[1] for shape in calls] == [7, 2, 2, 2, 1], "not chunked as asked"
    assert torch.equal(whole, chunked)


def test_positions_before_the_bags_and_without_a_bag_keep_their_embedding_bit_for_bit():
    embedding = torch.nn.Embedding(VOCAB, HIDDEN)
    ids, weights = random_bags()
    inputs = torch.randn(3, 9, HIDDEN)
    mixed = mix_bags(embedding, inputs, ids, weights)
    has_bag = torch.cat([torch.zeros(3, 4).bool(), weights.sum(-1) > 0], dim=1)
    assert has_bag.any() and (~has_bag[:, 4:]).any()
    assert torch.equal(mixed[~has_bag], inputs[~has_bag])
    expected = expected_mix(embedding.weight, inputs[:, 4:], ids, weights)
    torch.testing.assert_close(mixed[:, 4:].double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_taken_in_float32_and_come_back_in_the_dtype_of_the_model(dtype):
    embedding = torch.nn.Embedding(VOCAB, HIDDEN, dtype=dtype)
    ids, weights = random_bags(batch=8, positions=20, entries=16)
    inputs = torch.randn(8, 20, HIDDEN, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = mix_bags(embedding, inputs, ids, weights)
    assert mixed.dtype == dtype
    expected = expected_mix(embedding.weight, inputs, ids, weights)
    torch.testing.assert_close(mixed.double(), expected, atol=1e-5, rtol=0.51 * torch.finfo(dtype).eps)


def test_gradient_reaches_the_embedding_through_the_bag_and_through_the_plain_tokens():
    embedding = torch.nn.Embedding(VOCAB, HIDDEN)
    tokens = torch.randint(0, VOCAB, (3, 9))
    ids, weights = random_bags()
    pull = torch.randn(3, 9, HIDDEN)
    (mix_bags(embedding, embedding(tokens), ids, weights) * pull).sum().backward()

    matrix = embedding.weight.detach().double().requires_grad_()
    own = matrix[tokens]
    expected = torch.cat([own[:, :4], expected_mix(matrix, own[:, 4:], ids, weights)], dim=1)
    (expected * pull.double()).sum().backward()
    torch.testing.assert_close(embedding.weight.grad.double(), matrix.grad, atol=1e-5, rtol=0)
    only_in_bags = set(ids[weights > 0].tolist()) - set(tokens.flatten().tolist())
    assert embedding.weight.grad[sorted(only_in_bags)].abs().sum(-1).min() > 0


def test_gradient_reaches_weights_that_ask_for_it():
    embedding = torch.nn.Embedding(VOCAB, HIDDEN)
    ids, weights = random_bags()
    weights.requires_grad_()
    mix_bags(embedding, torch.randn(3, 5, HIDDEN), ids, weights).sum().backward()
    expected = embedding(ids).sum(-1) * (weights > 0).any(-1, keepdim=True)
    torch.testing.assert_close(weights.grad, expected, atol=1e-5, rtol=0)


def test_the_hook_takes_the_bags_out_of_the_arguments_and_is_transparent_without_them():
    model = torch.nn.Module()
    model.embed_tokens, model.config = torch.nn.Embedding(VOCAB, HIDDEN), SimpleNamespace()
    inputs, others = torch.randn(3, 5, HIDDEN), {"position_ids": 1}
    assert mix_thinking_inputs(model, inputs, others) is inputs and others == {"position_ids": 1}
    ids, weights = random_bags()
    arguments = {"thinking_bag_ids": ids, "thinking_bag_weights": weights, "position_ids": 1}
    mixed = mix_thinking_inputs(model, inputs, arguments)
    assert arguments == {"position_ids": 1}
    assert torch.equal(mixed, mix_bags(model.embed_tokens, inputs, ids, weights)) and not torch.equal(mixed, inputs)


def test_an_empty_bag_record_leaves_the_input_alone():
    inputs = torch.randn(2, 5, HIDDEN)
    nothing = torch.zeros(2, 0, 4)
    assert torch.equal(mix_bags(torch.nn.Embedding(VOCAB, HIDDEN), inputs, nothing.int(), nothing), inputs)


@pytest.mark.parametrize(
    ("ids_shape", "weights_shape", "line"),
    [
        (None, (2, 5, 4), "thinking_bag_ids and thinking_bag_weights go together"),
        ((2, 5, 4), None, "thinking_bag_ids and thinking_bag_weights go together"),
        ((2, 6, 4), (2, 6, 4), r"thinking_bag_ids \(2, 6, 4\) .* T <= 5"),
        ((3, 5, 4), (3, 5, 4), r"with B = 2 and T <= 5"),
        ((2, 5, 4), (2, 5, 3), r"thinking_bag_weights \(2, 5, 3\) must be \(B, T, K\)"),
    ],
)
def test_bags_that_do_not_fit_get_one_line(ids_shape, weights_shape, line):
    ids = None if ids_shape is None else torch.zeros(ids_shape, dtype=torch.int32)
    weights = None if weights_shape is None else torch.zeros(weights_shape)
    with pytest.raises(ValueError, match=line) as error:
        mix_bags(torch.nn.Embedding(VOCAB, HIDDEN), torch.randn(2, 5, HIDDEN), ids, weights)
    assert "\n" not in str(error.value)
