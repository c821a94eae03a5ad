# SPDX-License-Identifier: Apache-2.0
"""`cross_path_weights` and `apply_cross_path_interaction` against the float64 reference of eq. 2-6."""

from __future__ import annotations

import pytest
import torch
from reference import cross_path
from transformers.m3po import apply_cross_path_interaction, cosine_similarity, cross_path_weights

HIDDEN = 6


def random_case(seed, vocab=40, dtype=torch.float32, sharpness=3.0, thinking_share=0.7):
    """Groups of 1 to 5 paths under arbitrary ids, in shuffled order; some paths are not thinking."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 6, (3,), generator=g).tolist() + [1]
    names = [7, -2, 100, 31]
    groups = torch.tensor([name for name, size in zip(names, sizes, strict=True) for _ in range(size)])
    groups = groups[torch.randperm(len(groups), generator=g)]
    thinking = torch.rand(len(groups), generator=g) < thinking_share
    probs = (torch.randn(len(groups), vocab, generator=g) * sharpness).softmax(-1).to(dtype)
    embeds = torch.randn(len(groups), HIDDEN, generator=g).to(dtype)
    return embeds, probs, thinking, groups


def tolerance(temperature):
    """Rounding of a cosine in fp32, magnified by the temperature."""
    return 1e-6 + 1e-6 / temperature


def listeners(thinking, groups):
    peers = [cross_path.active_peers(i, thinking.tolist(), groups.tolist()) for i in range(len(groups))]
    return torch.tensor([bool(p) for p in peers])


@pytest.mark.parametrize("lambda_blend", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0, 10.0])
def test_blend_and_weights_equal_the_float64_formulas(temperature, lambda_blend):
    for seed in range(5):
        embeds, probs, thinking, groups = random_case(seed)
        blended, weights = apply_cross_path_interaction(
            embeds, probs, thinking, group_ids=groups, lambda_blend=lambda_blend, temperature=temperature
        )
        expected = cross_path.interaction(embeds, probs, thinking.tolist(), groups.tolist(), lambda_blend, temperature)
        assert weights.dtype == torch.float32 and weights.shape == (len(groups), len(groups))
        torch.testing.assert_close(weights.double(), expected[1], atol=tolerance(temperature), rtol=0)
        torch.testing.assert_close(blended.double(), expected[0], atol=4 * tolerance(temperature), rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_in_and_goes_out_and_is_computed_in_float32(dtype):
    for seed in range(6):
        embeds, probs, thinking, groups = random_case(seed, vocab=300, dtype=dtype)
        blended, weights = apply_cross_path_interaction(embeds, probs, thinking, group_ids=groups, lambda_blend=0.3)
        expected = cross_path.interaction(embeds, probs, thinking.tolist(), groups.tolist(), 0.3, 0.1)
        assert blended.dtype == dtype and weights.dtype == torch.float32
        torch.testing.assert_close(weights.double(), expected[1], atol=tolerance(0.1), rtol=0)
        # Nothing but the last rounding separates the two: half a unit of the dtype, and its tie.
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(blended.double(), expected[0], atol=1e-6, rtol=0.51 * unit)


def test_a_vocabulary_of_real_size_keeps_its_precision():
    embeds, probs, thinking, groups = random_case(5, vocab=151_936, sharpness=1.0)
    weights = cross_path_weights(probs, thinking, group_ids=groups, temperature=0.1)
    rows = cross_path.weights(probs, thinking.tolist(), groups.tolist(), 0.1)
    torch.testing.assert_close(weights.double(), torch.stack([torch.stack(r) for r in rows]), atol=2e-5, rtol=0)


def test_rows_with_a_peer_sum_to_one_and_everything_else_is_zero():
    for seed in range(20):
        _, probs, thinking, groups = random_case(seed, thinking_share=0.6)
        weights = cross_path_weights(probs, thinking, group_ids=groups, temperature=0.05)
        may = (groups[:, None] == groups[None]) & thinking[:, None] & thinking[None] & ~torch.eye(len(groups)).bool()
        assert torch.equal(weights[~may], torch.zeros_like(weights[~may]))
        torch.testing.assert_close(weights.sum(-1), listeners(thinking, groups).float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("thinking", [[0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 0, 0, 1], [1, 0, 1, 0, 0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_path_that_hears_nobody_keeps_its_vector_bit_for_bit(thinking, dtype):
    groups, thinking = torch.tensor([4, 4, 9, 4, 9]), torch.tensor(thinking, dtype=torch.bool)
    embeds, probs = torch.randn(5, HIDDEN).to(dtype), torch.randn(5, 30).softmax(-1).to(dtype)
    blended, weights = apply_cross_path_interaction(embeds, probs, thinking, group_ids=groups, lambda_blend=0.7)
    assert torch.equal(blended, embeds) and torch.equal(weights, torch.zeros(5, 5))


def test_two_peers_in_step_with_a_third_at_rest_hear_each_other_alone():
    embeds, probs = torch.randn(3, HIDDEN), torch.randn(3, 30).softmax(-1)
    thinking = torch.tensor([True, False, True])
    blended, weights = apply_cross_path_interaction(
        embeds, probs, thinking, group_ids=torch.zeros(3).long(), lambda_blend=0.25
    )
    assert torch.equal(weights, torch.tensor([[0.0, 0, 1], [0, 0, 0], [1, 0, 0]]))
    torch.testing.assert_close(blended[0], 0.75 * embeds[0] + 0.25 * embeds[2])
    assert torch.equal(blended[1], embeds[1])


def test_equal_distributions_give_uniform_weights():
    probs = torch.randn(1, 50).softmax(-1).expand(4, -1)
    weights = cross_path_weights(probs, torch.ones(4).bool(), group_ids=torch.zeros(4).long(), temperature=0.1)
    torch.testing.assert_close(weights, (1 - torch.eye(4)) / 3, atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_the_gradient_equals_that_of_the_float64_formulas_at_isolated_rows_too(temperature):
    for seed in range(6):
        embeds, probs, thinking, groups = random_case(seed, thinking_share=0.6)
        logits, coefficients = probs.log(), torch.randn_like(embeds)
        pulls = torch.randn(len(groups), len(groups))

        ours = [embeds.clone().requires_grad_(), logits.clone().requires_grad_()]
        blended, weights = apply_cross_path_interaction(
            ours[0], ours[1].softmax(-1), thinking, group_ids=groups, lambda_blend=0.4, temperature=temperature
        )
        ((blended * coefficients).sum() + (weights * pulls).sum()).backward()

        reference = [embeds.double().requires_grad_(), logits.double().requires_grad_()]
        blended, weights = cross_path.interaction(
            reference[0], reference[1].softmax(-1), thinking.tolist(), groups.tolist(), 0.4, temperature
        )
        ((blended * coefficients.double()).sum() + (weights * pulls.double()).sum()).backward()
        assert listeners(thinking, groups).any() and not listeners(thinking, groups).all(), "a poor case"
        for mine, theirs in zip(ours, reference, strict=True):
            assert mine.grad.isfinite().all()
            torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=20 * tolerance(temperature), rtol=1e-4)


def test_one_hot_and_equal_distributions_have_a_finite_gradient():
    logits = torch.tensor([[90.0, 0, 0], [90.0, 0, 0], [0, 90.0, 0], [0, 0, 90.0]], requires_grad=True)
    embeds = torch.randn(4, HIDDEN, requires_grad=True)
    blended, _ = apply_cross_path_interaction(
        embeds, logits.softmax(-1), torch.ones(4).bool(), group_ids=torch.tensor([0, 0, 0, 1]), temperature=0.01
    )
    blended.square().sum().backward()
    assert blended.isfinite().all() and logits.grad.isfinite().all() and embeds.grad.isfinite().all()


def test_autocast_changes_nothing():
    embeds, probs, thinking, groups = random_case(2, vocab=200)
    plain = apply_cross_path_interaction(embeds, probs, thinking, group_ids=groups, lambda_blend=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = apply_cross_path_interaction(embeds, probs, thinking, group_ids=groups, lambda_blend=0.5)
    assert torch.equal(plain[0], cast[0]) and torch.equal(plain[1], cast[1])


def test_lambda_zero_returns_the_vectors_themselves():
    embeds, probs, thinking, groups = random_case(1)
    assert apply_cross_path_interaction(embeds, probs, thinking, group_ids=groups, lambda_blend=0.0)[0] is embeds


def test_order_and_names_of_the_groups_do_not_matter():
    embeds, probs, thinking, groups = random_case(4)
    blended, weights = apply_cross_path_interaction(embeds, probs, thinking, group_ids=groups)
    order = torch.randperm(len(groups))
    again, moved = apply_cross_path_interaction(
        embeds[order], probs[order], thinking[order], group_ids=groups[order] * 3 + 1
    )
    torch.testing.assert_close(again, blended[order], atol=1e-6, rtol=0)
    torch.testing.assert_close(moved, weights[order][:, order], atol=2e-5, rtol=0)


def test_another_gating_function_takes_the_place_of_the_cosine():
    _, probs, thinking, groups = random_case(6)
    weights = cross_path_weights(
        probs, thinking, group_ids=groups, temperature=0.1, gating_function=lambda p: p @ p.transpose(-1, -2)
    )
    rows = cross_path.weights(probs, thinking.tolist(), groups.tolist(), 0.1, gate=lambda p, q: (p * q).sum())
    torch.testing.assert_close(weights.double(), torch.stack([torch.stack(r) for r in rows]), atol=1e-5, rtol=0)
    cosine = cross_path_weights(probs, thinking, group_ids=groups, temperature=0.1)
    assert (weights - cosine).abs().max() > 1e-2


def test_the_cosine_never_exceeds_one():
    assert cosine_similarity(torch.rand(3, 1, 5000).softmax(-1).expand(-1, 6, -1)).max() <= 1.0


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"lambda_blend": 1.5}, r"lambda_blend=1\.5 is outside \[0, 1\]"),
        ({"lambda_blend": -0.1}, r"lambda_blend=-0\.1 is outside \[0, 1\]"),
        ({"lambda_blend": float("nan")}, "lambda_blend=nan is outside"),
        ({"temperature": 0.0}, "temperature=0.0 is not above 0"),
        ({"temperature": -1.0}, "temperature=-1.0 is not above 0"),
        ({"group_ids": torch.zeros(4)}, "group_ids must be whole numbers"),
        ({"group_ids": torch.zeros(4, 1).long()}, r"group_ids must be whole numbers of shape \(B,\)"),
    ],
)
def test_bad_numbers_get_one_line(wrong, line):
    arguments = {"group_ids": torch.zeros(4).long(), "lambda_blend": 0.1, "temperature": 0.1} | wrong
    with pytest.raises(ValueError, match=line) as error:
        apply_cross_path_interaction(torch.randn(4, 2), torch.rand(4, 9), torch.ones(4).bool(), **arguments)
    assert "\n" not in str(error.value)
