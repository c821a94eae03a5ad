# SPDX-License-Identifier: Apache-2.0
"""Hyper-connections by themselves: doubly stochastic matrices, orientation, upstream's module, the start, the gate."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from reference import hyper_connections as reference
from reference.hyper_models import BAD_TAU, put_in_the_start_that_cannot_learn
from transformers import DeepseekV4Config
from transformers.m3po.hyper_connections.connections import (
    DynamicMHC,
    StreamOffsets,
    birkhoff,
    read_streams,
    reduce_streams,
    sinkhorn,
    write_streams,
)
from transformers.m3po.hyper_connections.doubly_stochastic import permutation_basis
from transformers.m3po.hyper_connections.routing_gate import as_gate, pop_routing_gate
from transformers.m3po.hyper_connections.settings import MHC_DEFAULTS, check_mhc_hyperparameters
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

KINDS = ["sinkhorn", "birkhoff"]

pytestmark = pytest.mark.usefixtures("one_thread")


def lively(mixer, size=0.5):
    """The mixer with random parameters: nothing symmetric, a dynamic part that matters."""
    with torch.no_grad():
        for value in mixer.parameters():
            value.normal_(std=size)
    return mixer


# --- doubly stochastic matrices


@pytest.mark.parametrize("streams", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sinkhorn_is_doubly_stochastic_and_the_references(streams, dtype):
    logits = torch.randn(3, 5, streams, streams).to(dtype)
    mine = sinkhorn(logits, 40)
    assert mine.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and mine.shape == logits.shape
    assert (mine.sum(-1) - 1).abs().max() < 1e-5 and (mine.sum(-2) - 1).abs().max() < 1e-6 and mine.min() >= 0
    for rounds, tau in ((1, 1.0), (3, 1.0), (20, 0.5)):
        mine = sinkhorn(logits, rounds, tau)
        expected = [reference.sinkhorn(one, rounds, tau) for one in logits.double().view(-1, streams, streams).numpy()]
        close = 1e-12 if dtype == torch.float64 else 2e-6
        np.testing.assert_allclose(mine.view(-1, streams, streams).numpy(), expected, atol=close)


def test_sinkhorns_matrices_lie_as_a_batched_product_wants_them():
    """Of other strides, torch.bmm copies each of them by itself: four fifths of a training step at small width."""
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    mine = sinkhorn(logits)
    assert mine.is_contiguous()
    (gradient,) = torch.autograd.grad(mine, logits, torch.randn(4, 4, 2, 3).permute(2, 3, 0, 1))
    assert gradient.shape == logits.shape


def test_a_low_temperature_leaves_the_manifold():
    """Why tau is 1.0: with logits of this size, 20 rounds at 0.05 miss the row sums by far."""
    logits = 0.55 * torch.randn(2000, 4, 4)
    errors = {tau: (sinkhorn(logits, 20, tau).sum(-1) - 1).abs().max().item() for tau in (1.0, BAD_TAU)}
    assert errors[1.0] < 1e-4 and errors[BAD_TAU] > 0.1


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite_forward_and_backward(scale, dtype):
    special = torch.tensor([[0.0, -1.0, -1.0], [0.0, -1.0, -1.0], [0.0, 0.0, 0.0]])  # two rows want one column
    special = torch.stack([special, -special, special.T, torch.zeros(3, 3)])
    for logits in (scale * special, scale * torch.randn(64, 4, 4)):
        logits = logits.to(dtype).requires_grad_()
        mine = sinkhorn(logits)
        (mine * torch.randn_like(mine)).sum().backward()
        assert mine.isfinite().all() and (mine.sum(-2) - 1).abs().max() < 1e-5
        assert logits.grad.isfinite().all()


def test_the_backward_of_sinkhorn_is_that_of_its_iterations():
    logits = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda given: sinkhorn(given, 5, 0.7), logits)
    assert torch.autograd.gradcheck(lambda given: sinkhorn(given, 1), logits)

    def plain(given):
        values = given.exp()
        for _ in range(20):
            values = values / values.sum(-1, keepdim=True)
            values = values / values.sum(-2, keepdim=True)
        return values

    weights = torch.randn_like(logits)
    mine, slow = (torch.autograd.grad((function(logits) * weights).sum(), logits)[0] for function in (sinkhorn, plain))
    torch.testing.assert_close(mine, slow, atol=1e-12, rtol=0)


@pytest.mark.parametrize("streams", [1, 2, 3, 4])
def test_birkhoff_is_exactly_doubly_stochastic_and_the_references(streams):
    logits = 5 * torch.randn(7, math.factorial(streams), dtype=torch.float64)
    basis = permutation_basis(streams)
    assert torch.equal(basis[0], torch.eye(streams).flatten())
    mine = birkhoff(logits, basis)
    torch.testing.assert_close(mine.sum(-1), torch.ones(7, streams, dtype=torch.float64), atol=1e-14, rtol=0)
    torch.testing.assert_close(mine.sum(-2), torch.ones(7, streams, dtype=torch.float64), atol=1e-14, rtol=0)
    np.testing.assert_allclose(mine.numpy(), [reference.birkhoff(one, streams) for one in logits.numpy()], atol=1e-14)
    assert birkhoff(logits.bfloat16(), basis).dtype == torch.float32


# --- the mixer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("streams", [1, 2, 4])
def test_matrices_reads_and_writes_are_the_references(kind, streams):
    """H_res is not symmetric here, so a transposed or mislaid one would show."""
    mixer = lively(DynamicMHC(6, streams, sinkhorn_iters=7, residual=kind).double())
    x, y = torch.randn(2, 3, streams, 6).double(), torch.randn(2, 3, 6).double()
    layer = torch.nn.Module()
    layer.mhc_attn = mixer
    with torch.no_grad():
        mixing, pre, post = mixer.get_matrices(x)
        taken, mix = read_streams(layer, "mhc_attn", x, None)
        written = write_streams(x, y, mix)
    assert mixing.shape == (2, 3, streams, streams) and pre.shape == post.shape == (2, 3, streams)
    if streams > 2:
        assert (mixing - mixing.transpose(-1, -2)).abs().max() > 0.05, "the test cannot tell"
    numbers = [value.detach().numpy() for value in (mixer.phi, mixer.bias, mixer.scale_bias)]
    for at in np.ndindex(2, 3):
        h_res, h_pre, h_post = reference.matrices(x[at].numpy(), *numbers, 1e-6, 7, 1.0, kind)
        np.testing.assert_allclose(mixing[at], h_res, atol=1e-12)
        np.testing.assert_allclose(pre[at], h_pre, atol=1e-12)
        np.testing.assert_allclose(post[at], h_post, atol=1e-12)
        np.testing.assert_allclose(taken[at], reference.read(x[at].numpy(), h_pre), atol=1e-12)
        expected = reference.write(x[at].numpy(), y[at].numpy(), h_res, h_post)
        np.testing.assert_allclose(written[at], expected, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_upstreams_own_module_computes_the_same_from_the_same_parameters(dtype):
    """`DeepseekV4HyperConnection` with its eps at 0, and the streams as its decoder layer writes them."""
    config = DeepseekV4Config(hidden_size=16, hc_mult=4, hc_sinkhorn_iters=20, hc_eps=0.0, rms_norm_eps=1e-6)
    theirs, mixer = DeepseekV4HyperConnection(config), lively(DynamicMHC(16, 4, eps=1e-6))
    shift = torch.cat([torch.full((4,), -math.log(3)), torch.zeros(20)])
    with torch.no_grad():
        theirs.fn.copy_(mixer.phi)
        theirs.base.copy_(mixer.bias + shift)
        theirs.scale.copy_(mixer.scale_bias)
        x, y = torch.randn(2, 5, 4, 16).to(dtype), torch.randn(2, 5, 16).to(dtype)
        layer = torch.nn.Module()
        layer.mhc_mlp = mixer
        post, comb, collapsed = theirs(x)
        mixing, _, h_post = mixer.get_matrices(x)
        taken, mix = read_streams(layer, "mhc_mlp", x, None)
        expected = post.to(dtype).unsqueeze(-1) * y.unsqueeze(-2) + torch.matmul(comb.to(dtype).transpose(-1, -2), x)
    assert mixing.dtype == h_post.dtype == torch.float32
    torch.testing.assert_close(mixing, comb, atol=1e-5, rtol=0)
    torch.testing.assert_close(h_post, post, atol=1e-5, rtol=0)
    rounding = 1e-5 if dtype == torch.float32 else 2**-5
    torch.testing.assert_close(taken, collapsed, atol=rounding, rtol=rounding)
    torch.testing.assert_close(write_streams(x, y, mix), expected, atol=rounding, rtol=rounding)


@pytest.mark.parametrize("kind", KINDS)
def test_the_backward_of_a_mixer_is_that_of_its_formula(kind):
    mixer = lively(DynamicMHC(3, 3, sinkhorn_iters=3, residual=kind).double())
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    parameters = [value.detach().requires_grad_() for value in mixer.parameters()]
    names = [name for name, _ in mixer.named_parameters()]

    def matrices(streams, *values):
        given = {f"mixer.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(Caller(mixer), given, (streams,))

    assert torch.autograd.gradcheck(matrices, (x, *parameters))
    with torch.no_grad():
        silent = mixer.get_matrices(x)
    assert all(torch.equal(one, other) for one, other in zip(silent, mixer.get_matrices(x), strict=True))
    zeros = torch.zeros(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)  # the embedding of a padding token
    mixer.get_matrices(zeros)[0].sum().backward()
    assert zeros.grad.isfinite().all()


class Caller(torch.nn.Module):
    """`get_matrices` as a forward."""

    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, streams):
        return self.mixer.get_matrices(streams)


def test_matrices_stay_float32_under_autocast_and_in_a_model_cast_to_bfloat16():
    mixer, x = lively(DynamicMHC(8, 4)), torch.randn(2, 3, 4, 8)
    expected = mixer.get_matrices(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = mixer.get_matrices(x)
        layer = torch.nn.Module()
        layer.mhc_attn = mixer
        taken, mix = read_streams(layer, "mhc_attn", x, None)
        written = write_streams(x, taken.bfloat16(), mix)
    assert all(torch.equal(one, other) for one, other in zip(inside, expected, strict=True))
    assert written.dtype == torch.float32 and taken.dtype == torch.float32
    assert all(one.dtype == torch.float32 for one in mixer.bfloat16().get_matrices(x.bfloat16()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("streams", [1, 2, 3, 4])
def test_the_start_equals_a_plain_residual_with_streams_that_differ_and_mix(kind, streams):
    """Six sublayers that are no linear maps, float64: the mean of the streams is the plain state (1e-12)."""
    layer = torch.nn.Module()
    layer.mhc_mlp = DynamicMHC(12, streams, residual=kind).double()
    offsets = StreamOffsets(12, streams, 0.3).double()
    plain = torch.randn(2, 5, 12).double()
    x = offsets(plain)
    assert torch.equal(offsets.offset_bias.sum(0), torch.zeros(12, dtype=torch.float64))
    mixing, pre, post = layer.mhc_mlp.get_matrices(x)
    if streams > 1:
        assert (x[..., 0, :] - x[..., 1, :]).abs().mean() > 0.1
        assert (mixing - torch.eye(streams)).norm(dim=(-2, -1)).min() > 1e-3
        off = 1 / (math.exp(5) + streams - 1)
        torch.testing.assert_close(mixing[0, 0, 0, 1].item(), off, atol=1e-7, rtol=0)  # of both kinds
    torch.testing.assert_close(pre, torch.full_like(pre, 1 / streams), atol=1e-15, rtol=0)
    assert torch.equal(post, torch.ones_like(post))
    for step in range(6):
        taken, mix = read_streams(layer, "mhc_mlp", x, None)
        x = write_streams(x, torch.tanh(3 * taken.roll(step, -1)), mix)
        plain = plain + torch.tanh(3 * plain.roll(step, -1))
    on = type("Config", (), {"mhc_enabled": True})
    torch.testing.assert_close(reduce_streams(on, x), plain, atol=1e-12, rtol=0)


def learns_a_permutation(mixer):
    """The loss before and after 300 steps of Adam at 1e-2 on carrying each stream to its neighbour's place."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 1, 4, 16, generator=generator)
    target = x[:, :, [1, 2, 3, 0]]
    optimizer = torch.optim.Adam(mixer.parameters(), lr=1e-2)
    losses = []
    for _ in range(300):
        mixing, _, _ = mixer.get_matrices(x)
        loss = (mixing.transpose(-1, -2) @ x - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_default_start_learns_to_permute_the_streams(kind):
    before, after = learns_a_permutation(DynamicMHC(16, 4, residual=kind))
    assert 1.5 < before < 2.5 and after < before / 2


def test_a_start_at_the_edge_of_saturation_learns_nothing():
    mixer = put_in_the_start_that_cannot_learn(DynamicMHC(16, 4, sinkhorn_tau=BAD_TAU))
    before, after = learns_a_permutation(mixer)
    assert after > 0.95 * before
    assert not mixer.bias.grad[8:].any(), "at a uniform start the gradient of H_res is exactly 0"


# --- the gate


@pytest.mark.parametrize("kind", KINDS)
def test_the_gate_is_exact_at_both_ends_and_acts_on_h_res_alone(kind):
    mixer = lively(DynamicMHC(8, 4, residual=kind, index=(1, 1)))
    x = torch.randn(3, 5, 4, 8)
    full, pre, post = mixer.get_matrices(x)
    for value, expected in ((0.0, torch.eye(4).expand_as(full)), (1.0, full)):
        gated = mixer.get_matrices(x, as_gate(value, 2))
        assert torch.equal(gated[0], expected) and torch.equal(gated[1], pre) and torch.equal(gated[2], post)
    distances = [
        (mixer.get_matrices(x, as_gate(value, 2))[0] - torch.eye(4)).norm().item() for value in (0, 0.2, 0.5, 0.9, 1)
    ]
    assert distances == sorted(distances) and len(set(distances)) == 5
    gate = torch.zeros(3, 2, 2)
    gate[:, 1, 1] = torch.tensor([0.0, 0.3, 1.0])
    mixing = mixer.get_matrices(x, gate)[0]
    for row, value in enumerate((0.0, 0.3, 1.0)):
        np.testing.assert_allclose(
            mixing[row].detach(), (1 - value) * np.eye(4) + value * full[row].detach().numpy(), atol=1e-6
        )
    expected = reference.gated(full[1, 0].detach().double().numpy(), 0.3)
    np.testing.assert_allclose(mixing[1, 0].detach(), expected, atol=1e-6)
    assert (mixing.sum(-2) - 1).abs().max() < 1e-5


@pytest.mark.parametrize(
    "value", [0.5, torch.tensor(0.5), torch.full((3, 2), 0.5), torch.full((5, 1, 1), 0.5), [[[0.5]]], 1]
)
def test_gates_that_broadcast_are_taken(value):
    gate = as_gate(value, layers=3, rows=5)
    assert gate.shape[1:] == (3, 2) and gate.shape[0] in (1, 5) and gate.dtype == torch.float32


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.full((5,), 0.5), r"could mean rows or layers"),
        ([0.5, 0.5], r"could mean rows or layers"),
        (torch.full((4, 2), 0.5), r"does not broadcast to \(5, 3, 2\)"),
        (torch.full((4, 3, 2), 0.5), r"does not broadcast to \(5, 3, 2\)"),
        (torch.full((1, 1, 1, 1), 0.5), r"does not broadcast"),
        (1.01, r"outside \[0, 1\]"),
        (-0.01, r"outside \[0, 1\]"),
        (math.nan, r"outside \[0, 1\]"),
    ],
)
def test_other_gates_are_refused_in_one_line(value, said):
    with pytest.raises(ValueError, match=said) as error:
        as_gate(value, layers=3, rows=5)
    assert "mhc_gate" in str(error.value) and "\n" not in str(error.value)


def test_the_values_of_a_gate_are_looked_at_where_they_are_and_not_on_its_device():
    """On a GPU the look would wait for it, once a token. The meta device has no values that could be looked at."""
    gate = as_gate(0.5, layers=3, device=torch.device("meta"))
    assert gate.device.type == "meta" and gate.shape == (1, 3, 2)
    with pytest.raises(ValueError, match="outside"):
        as_gate(2.0, layers=3, device=torch.device("meta"))


def test_generate_gets_a_gate_for_all_rows_in_a_form_that_it_does_not_repeat():
    kwargs = {"mhc_gate": torch.full((1, 2, 2), 0.5)}
    pop_routing_gate(kwargs)
    assert kwargs == {"mhc_gate": [[[0.5, 0.5]] * 2]}
    whole = torch.full((3, 2, 2), 0.5)
    kwargs = {"mhc_gate": whole}
    pop_routing_gate(kwargs)
    assert kwargs["mhc_gate"] is whole
    pop_routing_gate({})
    with pytest.raises(ValueError, match="mhc_gate"):
        pop_routing_gate({"mhc_gate": torch.ones(3)})


# --- what is refused


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("mhc_num_streams", 0),
        ("mhc_sinkhorn_iters", 0),
        ("mhc_sinkhorn_tau", 0.0),
        ("mhc_sinkhorn_tau", -1.0),
        ("mhc_residual", "orthogonal"),
        ("mhc_diagonal_bias", -1.0),
        ("mhc_diagonal_bias", 1000.0),
        ("mhc_stream_offset", -0.1),
        ("mhc_gate_noise", 1.5),
    ],
)
def test_a_number_that_breaks_its_rule_is_named(flag, value):
    with pytest.raises(ValueError, match=flag) as error:
        check_mhc_hyperparameters({**MHC_DEFAULTS, flag: value})
    assert "\n" not in str(error.value)


def test_birkhoff_takes_at_most_four_streams():
    for attempt in (
        lambda: DynamicMHC(8, 5, residual="birkhoff"),
        lambda: permutation_basis(5),
        lambda: check_mhc_hyperparameters({**MHC_DEFAULTS, "mhc_num_streams": 5, "mhc_residual": "birkhoff"}),
    ):
        with pytest.raises(ValueError, match=r"mhc_num_streams=5.*at most 4 streams.*sinkhorn"):
            attempt()
    DynamicMHC(8, 5)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"square matrices"):
        sinkhorn(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"at least 1 round"):
        sinkhorn(torch.zeros(3, 3), 0)
    with pytest.raises(ValueError, match=r"mhc_num_streams=4"):
        DynamicMHC(8, 4).get_matrices(torch.zeros(1, 2, 3, 8))
