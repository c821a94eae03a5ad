# SPDX-License-Identifier: Apache-2.0
"""The parameter-free gates against their formulas in float64, and what all gates have in common."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from reference import gates as reference
from reference.gates import distributions
from transformers.m3po import ThinkingSettings, apply_cross_path_interaction
from transformers.m3po.gating import (
    BaseM3POGating,
    KLDivergenceGating,
    create_gating_function,
    factory,
    kernels,
    list_gating_functions,
    parameter_free_gates,
    register_gating_function,
)
from transformers.m3po.gating.kernels import block_topk, gram, root_gram

GATES = sorted(reference.GATES)
KINDS = ("peaked", "flat", "one-hot", "uniform", "identical", "disjoint")


def off_diagonal(matrix: torch.Tensor) -> torch.Tensor:
    return matrix[..., ~torch.eye(matrix.shape[-1], dtype=torch.bool)]


@pytest.mark.parametrize("name", GATES)
def test_similarity_is_the_formula(name: str) -> None:
    for kind in KINDS:
        for paths in (1, 2, 3, 8, 16):
            check_similarity_is_the_formula(name, kind, paths)


def check_similarity_is_the_formula(name: str, kind: str, paths: int) -> None:
    probs = distributions(kind, paths)
    mine = create_gating_function(name)(probs)
    assert mine.shape == (2, paths, paths) and mine.dtype == torch.float32 and torch.isfinite(mine).all()
    expected = np.stack([reference.similarity(name, group.double().numpy()) for group in probs])
    # The root of a divergence of 1e-7, which is rounding, is 5e-4.
    tolerance = 1e-3 if name == "kl_divergence" and kind in ("uniform", "identical", "one-hot") else 2e-5
    np.testing.assert_allclose(off_diagonal(mine), off_diagonal(torch.from_numpy(expected)), atol=tolerance)
    torch.testing.assert_close(mine, mine.transpose(-1, -2), atol=1e-6, rtol=1e-6)
    assert off_diagonal(mine).min() >= -1e-6 if paths > 1 else True
    assert off_diagonal(mine).max() <= 1.0 + 1e-6 if paths > 1 else True


@pytest.mark.parametrize("name", GATES)
def test_bf16_distributions_are_taken_in_float32(name: str) -> None:
    probs = distributions("peaked", 4).to(torch.bfloat16)
    gate = create_gating_function(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine = gate(probs)
    assert mine.dtype == torch.float32
    assert torch.equal(mine, gate(probs.float()))


@pytest.mark.parametrize("name", GATES)
def test_attention_is_the_softmax_over_the_active_peers(name: str) -> None:
    for active in ("all", "some", "one", "none"):
        check_attention_is_the_softmax_over_the_active_peers(name, active)


def check_attention_is_the_softmax_over_the_active_peers(name: str, active: str) -> None:
    probs = distributions("peaked", 5)
    gate = create_gating_function(name)
    counts = {"all": 5, "some": 3, "one": 1, "none": 0}
    mask = (torch.arange(5) < counts[active]).expand(2, -1)
    mine = gate.compute_attention_weights(gate(probs), mask)
    for group in range(2):
        scores = reference.similarity(name, probs[group].double().numpy())
        expected = reference.attention(scores, mask[group].numpy(), gate.temperature)
        np.testing.assert_allclose(mine[group], expected, atol=5e-4 if name == "scaled_dot" else 2e-4)


@pytest.mark.parametrize("name", GATES)
def test_gradient_is_finite(name: str) -> None:
    for kind in KINDS:
        for vocabulary in (40, 1500):  # at 1500, the Jensen-Shannon divergence is not worked out in full
            check_gradient_is_finite(name, kind, vocabulary)


def check_gradient_is_finite(name: str, kind: str, vocabulary: int) -> None:
    probs = distributions(kind, 4, vocabulary).requires_grad_()
    gate = create_gating_function(name)
    weights = gate.compute_attention_weights(gate(probs), torch.tensor([True, True, True, False]).expand(2, -1))
    (weights * torch.rand(4, 4)).sum().backward()
    assert torch.isfinite(probs.grad).all()


def test_scaled_dot_is_raw_dot_at_another_temperature() -> None:
    probs = distributions("peaked", 6)
    raw, scaled = (create_gating_function(name) for name in ("raw_dot", "scaled_dot"))
    scaled.temperature = raw.temperature / probs.shape[-1] ** 0.5
    everyone = torch.ones(2, 6, dtype=torch.bool)
    weights = [gate.compute_attention_weights(gate(probs), everyone) for gate in (raw, scaled)]
    torch.testing.assert_close(weights[0], weights[1], atol=1e-6, rtol=1e-5)


def test_gram_is_the_product() -> None:
    for paths in range(1, 11):
        check_gram_is_the_product(paths)


def check_gram_is_the_product(paths: int) -> None:
    g = torch.Generator().manual_seed(paths)
    rows = torch.randn(2, 3, paths, 50, generator=g, dtype=torch.float64).requires_grad_()
    factor = torch.randn(paths, paths, generator=g, dtype=torch.float64)
    grads = []
    for mine in (gram(rows), rows @ rows.mT):
        torch.testing.assert_close(mine, rows @ rows.mT)
        grads += torch.autograd.grad((mine * factor).sum(), rows)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("shape", [(3, 40), (2, 4, 512), (2, 4, 5000), (1, 2, 10, 1537)])
def test_root_gram_in_parts_is_the_sum_of_the_roots(
    shape: tuple[int, ...], with_gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "BUFFER", 8192)  # several parts, the last of them shorter
    probs = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(3).softmax(-1)
    probs[..., 7] = 0.0
    roots = probs.double().sqrt()
    mine = root_gram(probs.requires_grad_(with_gradient))
    assert mine.requires_grad == with_gradient and torch.equal(mine, mine.mT)
    torch.testing.assert_close(mine.double(), roots @ roots.mT, atol=5e-7, rtol=0)


def test_root_gram_of_flat_rows_is_off_by_less_than_is_allowed_for() -> None:
    length = 151936
    rows = [torch.linspace(1, end, length) for end in (1, 2, 5, 100)]
    rows += [torch.tensor(steps).repeat(length // 4) for steps in ([1.0, 2, 3, 4], [0.1, 1, 7, 1], [1.0, 0, 0, 0])]
    rows.append(torch.ones(length).index_fill(0, torch.tensor([0]), float(length)))  # half of it on one token
    probs = torch.stack([row.double() / row.double().sum() for row in rows])
    expected = probs.sqrt() @ probs.sqrt().mT
    for mine in (root_gram(probs.float()), root_gram(probs.float().requires_grad_())):
        assert (mine - expected).abs().max() < parameter_free_gates.ROUNDING


def spread_out(spread: float, paths: int = 4, vocabulary: int = 9000, noise: float = 0.7) -> torch.Tensor:
    """(2, N, V) float32: softmax of `spread` times normal logits, of which each path has some noise of its own."""
    g = torch.Generator().manual_seed(3)
    common = torch.randn(2, 1, vocabulary, generator=g)
    return (spread * (common + noise * torch.randn(2, paths, vocabulary, generator=g))).softmax(-1)


@pytest.mark.parametrize(
    ("spread", "noise", "allowed", "largest"),  # of the error, and of its bound
    [
        (0.0, 0.0, 1e-3, 3e-3),  # rounding: the root of a divergence of 1e-6 is 1e-3
        (0.1, 0.01, 1e-3, 3e-3),
        (0.1, 0.7, 1e-3, 0.01),
        (0.5, 0.7, 2e-3, 0.04),
        (1.0, 0.7, 0.01, 0.065),
        (1.0, 3.0, 0.01, 0.08),
        (2.0, 0.7, 0.01, 0.065),
        (4.0, 0.7, 5e-3, 0.02),
        (8.0, 0.7, 5e-4, 1e-3),
    ],
)
def test_divergence_of_a_large_vocabulary_is_within_its_bound(
    spread: float, noise: float, allowed: float, largest: float
) -> None:
    probs = spread_out(spread, noise=noise)
    gate = KLDivergenceGating()
    assert not gate.statistics()
    mine = off_diagonal(gate(probs)).double().numpy()
    bound = gate.statistics()["similarity_error"].item()
    expected = np.stack([reference.similarity("kl_divergence", group.double().numpy()) for group in probs])
    error = np.abs(mine - off_diagonal(torch.from_numpy(expected)).numpy()).max()
    assert error <= bound
    assert error <= allowed and bound <= largest
    before = gate.statistics()["similarity_error"].clone()
    gate(distributions("one-hot", 4, vocabulary=9000))
    assert torch.equal(gate.statistics()["similarity_error"], before)  # the largest of all


@pytest.mark.parametrize("spread", [0.1, 1.0, 2.0, 4.0])
def test_divergence_is_between_its_bounds_for_every_pair(spread: float) -> None:
    probs = spread_out(spread)
    low, mine, high = (off_diagonal(part) for part in parameter_free_gates._bounded_divergence(probs))
    exact = off_diagonal(parameter_free_gates._exact_divergence(probs.double()))
    assert (low <= exact).all() and (exact <= high).all() and (low <= mine).all() and (mine <= high).all()


def test_divergence_has_no_error_where_nothing_is_left_over() -> None:
    for kind in ("one-hot", "disjoint"):
        gate = KLDivergenceGating()
        probs = distributions(kind, 4, vocabulary=9000)
        expected = np.stack([reference.similarity("kl_divergence", group.double().numpy()) for group in probs])
        np.testing.assert_allclose(off_diagonal(gate(probs)), off_diagonal(torch.from_numpy(expected)), atol=2e-6)
        assert gate.statistics()["similarity_error"] <= 3e-6


@pytest.mark.parametrize(("length", "k"), [(5000, 3), (128 * 40, 8), (128 * 40 + 1, 8), (300, 64), (7, 7)])
def test_two_stages_find_the_largest(length: int, k: int) -> None:
    values = torch.randn(3, 2, length, generator=torch.Generator().manual_seed(length))
    values[0, 0, -1] = 9.0  # in the last, incomplete block
    mine, ids = block_topk(values, k)
    assert torch.equal(mine, values.topk(k).values)
    assert torch.equal(values.gather(-1, ids), mine)


@pytest.mark.parametrize("name", GATES)
def test_interaction_takes_a_gate_and_none_is_the_baseline(name: str) -> None:
    probs, embeds = distributions("peaked", 6, groups=1)[0], torch.randn(6, 8)
    given = {"group_ids": torch.tensor([0, 0, 0, 1, 1, 0]), "temperature": 0.2, "lambda_blend": 0.5}
    thinking = torch.tensor([True, True, False, True, True, True])
    gate = create_gating_function(name)
    _, weights = apply_cross_path_interaction(embeds, probs, thinking, gating_function=gate, **given)
    _, plain = apply_cross_path_interaction(embeds, probs, thinking, **given)
    assert torch.equal(weights, plain) == (name == "baseline")
    first = reference.similarity(name, probs[[0, 1, 5]].double().numpy())
    expected = reference.attention(first, np.ones(3, dtype=bool), 0.2)
    np.testing.assert_allclose(weights[[0, 1, 5]][:, [0, 1, 5]], expected, atol=1e-4)


class Overlap(BaseM3POGating):
    """A gate from outside, in three lines."""

    default_temperature: ClassVar[float] = 0.25
    options = ("power",)

    def compute_similarity_matrix(self, probs: torch.Tensor) -> torch.Tensor:
        return torch.minimum(probs.unsqueeze(-2), probs.unsqueeze(-3)).sum(-1)


@pytest.fixture
def overlap(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(factory, "_GATES", dict(factory._GATES))
    register_gating_function("overlap", Overlap)
    return "overlap"


def test_a_gate_from_outside_is_known_everywhere(overlap: str) -> None:
    assert overlap in list_gating_functions()
    settings = ThinkingSettings(gating_type=overlap, gating_config={"power": 2})
    assert settings.temperature == 0.25
    assert create_gating_function(overlap, {"temperature": 0.5}).temperature == 0.5
    register_gating_function(overlap, Overlap)  # the same class again
    with pytest.raises(ValueError, match="'overlap' is Overlap already"):
        register_gating_function(overlap, KLDivergenceGating)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: create_gating_function("cosine"), "gating_type='cosine' is unknown; set one of bahdanau, baseline, "),
        (lambda: create_gating_function("raw_dot", {"exact": True}), "no option 'exact' for RawDotProductGating"),
        (lambda: create_gating_function("raw_dot", {"temperature": 0}), "temperature=0.0 is not above 0"),
        (
            lambda: ThinkingSettings(gating_type="raw_dot", gating_config={"exact": True}),
            "'exact' for gating function 'raw_dot'",
        ),
    ],
)
def test_wrong_names_and_options_are_refused_in_one_line(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_gate_without_a_temperature_cannot_be_registered() -> None:
    class Nameless(BaseM3POGating):
        def compute_similarity_matrix(self, probs: torch.Tensor) -> torch.Tensor:
            return probs @ probs.mT

    with pytest.raises(TypeError, match="Nameless has no default_temperature"):
        register_gating_function("nameless", Nameless)
    with pytest.raises(TypeError, match="no subclass of BaseM3POGating"):
        register_gating_function("function", lambda probs: probs)  # type: ignore[arg-type]


def test_the_prototypes_import_path_leads_here() -> None:
    from transformers.m3po import gating
    from transformers.models.qwen2 import m3po_gating
    from transformers.models.qwen2.m3po_gating.base import BaseM3POGating as base
    from transformers.models.qwen2.m3po_gating.factory import create_gating_function as create
    from transformers.models.qwen2.m3po_gating.parameter_free_gates import RawDotProductGating as raw_dot

    assert (base, create, raw_dot) == (gating.BaseM3POGating, gating.create_gating_function, gating.RawDotProductGating)
    assert m3po_gating.list_gating_functions is gating.list_gating_functions
