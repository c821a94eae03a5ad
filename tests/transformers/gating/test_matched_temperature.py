# SPDX-License-Identifier: Apache-2.0
"""`temperature="match"`: every gate as sharp as the baseline in each group, by a bisection in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from reference import gates, learnable_gates
from transformers.m3po import PathGroups, apply_cross_path_interaction
from transformers.m3po.gating import create_gating_function
from transformers.m3po.gating.base import attention_weights
from transformers.m3po.gating.matched_temperature import matched_temperature
from transformers.m3po.thinking.interaction import cross_path_weights, path_attention

VOCAB = 40
FREE = ("raw_dot", "scaled_dot", "bhattacharyya", "kl_divergence")
LEARNABLE = ("luong", "bahdanau")
KINDS = ("peaked", "flat", "one-hot", "uniform", "identical", "disjoint")
UNEVEN = torch.tensor([7, 2, 7, 4, 2, 7, 7, 7])  # sizes 5, 2 and 1
SOME = torch.tensor([True, True, False, True, True, True, True, True])

pytestmark = pytest.mark.usefixtures("one_thread")


def made(name: str, scale: float = 1.0) -> Any:
    """A gate; one with parameters is away from its start, and `scale` times as large."""
    if name in FREE or name == "baseline":
        return create_gating_function(name)
    gate = create_gating_function(name, {"vocab_size": VOCAB})
    g = torch.Generator().manual_seed(3)
    gate.start(g)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))
        (gate.U if name == "luong" else gate.v).mul_(scale)
    return gate


def distributions(kind: str, rows: int, seed: int = 0) -> torch.Tensor:
    """(B, V) float32."""
    g = torch.Generator().manual_seed(seed)
    if kind in ("peaked", "flat"):
        shared = 2 * torch.randn(VOCAB, generator=g)
        return (shared + torch.randn(rows, VOCAB, generator=g) * (3 if kind == "peaked" else 0.5)).softmax(-1)
    if kind == "one-hot":
        return torch.eye(VOCAB)[torch.arange(rows) % 3]
    if kind == "uniform":
        return torch.full((rows, VOCAB), 1 / VOCAB)
    if kind == "identical":
        return (3 * torch.randn(VOCAB, generator=g)).softmax(-1).expand(rows, -1).contiguous()
    probs = torch.zeros(rows, VOCAB)
    for row in range(rows):
        probs[row, 2 * row : 2 * row + 2] = 0.5
    return probs


def parts(values: torch.Tensor, active: torch.Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows and flags of each group in float64."""
    rows = learnable_gates.members(UNEVEN.tolist())
    return [(values[part].double().numpy(), active[part].numpy()) for part in rows]


@pytest.mark.parametrize("name", [*FREE, *LEARNABLE])
def test_each_group_has_the_entropy_of_the_baseline(name: str) -> None:
    for kind in ("peaked", "flat"):
        for active in (torch.ones(8, dtype=torch.bool), SOME):
            check_each_group_has_the_entropy_of_the_baseline(name, kind, active)


def check_each_group_has_the_entropy_of_the_baseline(name: str, kind: str, active: torch.Tensor) -> None:
    probs, groups, gate = distributions(kind, 8), PathGroups(UNEVEN), made(name)
    found = path_attention(probs, active, groups, "match", gate)
    assert found.temperature.shape == (3, 1, 1)
    reached = 0
    for group, (p, on) in enumerate(parts(probs, active)):
        size = len(p)
        mine = found.weights[group, :size, :size].detach().double().numpy()
        wanted = learnable_gates.entropy(gates.attention(gates.similarity("baseline", p), on, 0.1))
        scores = found.similarity[group, :size, :size].detach().double().numpy()
        temperature = learnable_gates.matched_temperature(scores, on, wanted)
        if temperature is None:
            assert on.sum() < 3, "a group of three or more could have been matched"
            continue
        reached += 1
        assert abs(learnable_gates.entropy(mine) - wanted) < 1e-3
        assert abs(np.log(float(found.temperature[group]) / temperature)) < 2e-3
        np.testing.assert_allclose(mine, gates.attention(scores, on, temperature), atol=1e-3)
    assert reached == 1


def test_the_scale_of_a_similarity_does_not_matter() -> None:
    for factor in (1e-9, 1e-4, 1.0, 1e4):
        check_the_scale_of_a_similarity_does_not_matter(factor)


def check_the_scale_of_a_similarity_does_not_matter(factor: float) -> None:
    g = torch.Generator().manual_seed(0)
    similarity, active = torch.rand(5, 6, 6, generator=g), torch.ones(5, 6, dtype=torch.bool)
    target = attention_weights(torch.rand(5, 6, 6, generator=g), active, 0.3)[0]
    one = matched_temperature(similarity, active, target)
    other = matched_temperature(factor * similarity - 3 * factor, active, target)
    torch.testing.assert_close(other / factor, one, atol=0, rtol=1e-2 if factor < 1 else 1e-3)
    for group in range(5):
        wanted = learnable_gates.entropy(target[group].double().numpy())
        scores, on = similarity[group].double().numpy(), active[group].numpy()
        exact = learnable_gates.matched_temperature(scores, on, wanted)
        assert exact is not None and abs(np.log(float(one[group]) / exact)) < 1e-3


def test_the_scaled_dot_product_is_the_raw_one() -> None:
    for kind in KINDS:
        for active in (torch.ones(8, dtype=torch.bool), SOME):
            check_the_scaled_dot_product_is_the_raw_one(kind, active)


def check_the_scaled_dot_product_is_the_raw_one(kind: str, active: torch.Tensor) -> None:
    probs = distributions(kind, 8)
    given = {"group_ids": UNEVEN, "temperature": "match"}
    raw, scaled = (
        cross_path_weights(probs, active, gating_function=made(name), **given) for name in ("raw_dot", "scaled_dot")
    )
    torch.testing.assert_close(raw, scaled, atol=1e-4, rtol=0)


@pytest.mark.parametrize("gate", [None, "baseline"])
def test_the_baseline_matches_itself(gate: str | None) -> None:
    probs, function = distributions("peaked", 8), None if gate is None else made(gate)
    matched = cross_path_weights(probs, SOME, group_ids=UNEVEN, temperature="match", gating_function=function)
    assert torch.equal(matched, cross_path_weights(probs, SOME, group_ids=UNEVEN, temperature=0.1))


@pytest.mark.parametrize("name", [*FREE, *LEARNABLE])
def test_weights_and_gradients_are_finite_for_any_distributions(name: str) -> None:
    for kind in KINDS:
        for scale in (1.0, 1000.0):
            check_weights_and_gradients_are_finite_for_any_distributions(name, kind, scale)


def check_weights_and_gradients_are_finite_for_any_distributions(name: str, kind: str, scale: float) -> None:
    gate = made(name, scale)
    for rows, active in ((8, SOME), (2, SOME[:2]), (2, ~SOME[1:3]), (3, ~SOME[:3]), (3, SOME[3:6])):
        for ids in (UNEVEN[:rows], torch.zeros(rows, dtype=torch.long)):
            gate.zero_grad()
            probs = distributions(kind, rows).requires_grad_()
            weights = cross_path_weights(probs, active, group_ids=ids, temperature="match", gating_function=gate)
            assert torch.isfinite(weights).all()
            sums = weights.detach().sum(-1)
            alike = ids[:, None] == ids[None, :]
            peers = (alike & active[:, None] & active[None, :]).sum(-1) > 1
            torch.testing.assert_close(sums, peers.float())
            (weights * torch.rand(rows, rows)).sum().backward()
            grads = [value.grad for value in (probs, *gate.parameters())]
            # A change of the distributions of 1 moves no weight by more than 1 / T, and T is not lost in rounding.
            assert all(grad is None or float(grad.abs().max()) < 1e7 for grad in grads), "a gradient explodes"


@pytest.mark.parametrize("name", [*FREE, *LEARNABLE])
def test_groups_do_not_touch_each_other(name: str) -> None:
    ids, gate = torch.tensor([0, 1, 0, 1, 2, 0, 1, 2]), made(name)
    active = torch.tensor([True, True, True, True, True, True, True, False])
    probs = distributions("peaked", 8)
    given = {"group_ids": ids, "temperature": "match", "gating_function": gate}
    before = cross_path_weights(probs, active, **given)
    for kind in ("flat", "one-hot", "uniform"):  # similarities of smaller and of larger spread
        other = torch.where((ids == 1)[:, None], distributions(kind, 8, seed=9), probs)
        after = cross_path_weights(other, active, **given)
        assert torch.equal(before[ids != 1], after[ids != 1])
        assert not torch.equal(before[ids == 1], after[ids == 1])
    without = cross_path_weights(probs, active & (ids != 1), **given)
    assert torch.equal(before[ids != 1], without[ids != 1])


def test_the_interaction_takes_match() -> None:
    probs, embeds, gate = distributions("peaked", 8), torch.randn(8, 6), made("raw_dot")
    given = {"group_ids": UNEVEN, "temperature": "match", "gating_function": gate}
    blended, weights = apply_cross_path_interaction(embeds, probs, SOME, lambda_blend=0.5, **given)
    assert torch.equal(weights, cross_path_weights(probs, SOME, **given))
    listens = (weights > 0).any(-1)
    expected = torch.where(listens[:, None], 0.5 * embeds + 0.5 * weights @ embeds, embeds)
    torch.testing.assert_close(blended, expected, atol=1e-6, rtol=0)
    assert not torch.equal(weights, cross_path_weights(probs, SOME, group_ids=UNEVEN, temperature=0.1))


def test_no_gradient_goes_through_the_temperature() -> None:
    probs, gate = distributions("peaked", 5), made("luong")
    everyone = torch.ones(5, dtype=torch.bool)
    found = path_attention(probs, everyone, PathGroups(torch.zeros(5, dtype=torch.long)), "match", gate)
    assert not found.temperature.requires_grad
    pull = torch.rand(5, 5)
    mine = torch.autograd.grad((found.weights[0] * pull).sum(), gate.U)[0]
    given = {key: value.detach().double().requires_grad_() for key, value in gate.named_parameters()}
    scores = learnable_gates.similarity("luong", given, probs)
    weights = learnable_gates.attention(scores, [True] * 5, float(found.temperature))
    (weights * pull).sum().backward()
    torch.testing.assert_close(mine.double(), given["U"].grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("temperature", ["Match", "0.1", "", 0.0, -1.0])
def test_another_word_or_no_temperature_is_refused(temperature: Any) -> None:
    with pytest.raises(ValueError, match="temperature=.*'match'") as error:
        apply_cross_path_interaction(
            torch.zeros(2, 3), distributions("flat", 2), SOME[:2], group_ids=UNEVEN[:2], temperature=temperature
        )
    assert "\n" not in str(error.value)
