# SPDX-License-Identifier: Apache-2.0
"""The report on hyper-connections: its figures against the slow formulas, its verdicts, what it leaves as it was."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from reference import hyper_connections as reference
from reference.tiny import left_padded
from transformers import NanoChatConfig, NanoChatForCausalLM
from transformers.m3po.hyper_connections.report import (
    NO_EFFECT,
    full_report,
    gate_effect,
    gradient_norms,
    mixers,
    routing_report,
    start_matrix,
    verdicts,
)

pytestmark = pytest.mark.usefixtures("one_thread")
INPUTS = left_padded([7, 4])


@pytest.fixture(params=["sinkhorn", "birkhoff"])
def kind(request):
    return request.param


def tiny(kind="sinkhorn", away=0.0, **config):
    """A NanoChat of two layers whose hyper-connections stand so far from their start."""
    torch.manual_seed(0)
    model = NanoChatForCausalLM(
        NanoChatConfig(
            vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            pad_token_id=0, mhc_enabled=True, mhc_residual=kind, initializer_range=0.2, **config,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "mhc" in name:
                value.add_(away * torch.randn_like(value))
    return model


def seen(model):
    """Each sublayer's streams and matrices on the batch, taken by a second way: forward hooks on its norm."""
    kept = []
    for mixer in mixers(model).values():
        original = mixer.get_matrices
        mixer.get_matrices = lambda x, gate=None, original=original: kept.append((x, original(x, gate))) or kept[-1][1]
    with torch.no_grad():
        model(**INPUTS)
    for mixer in mixers(model).values():
        del mixer.get_matrices
    return kept


def test_the_figures_are_those_of_the_slow_formulas(kind):
    model = tiny(kind, away=0.8)
    report, mask = routing_report(model, INPUTS), INPUTS["attention_mask"].bool()
    places = [(row, place) for row in range(2) for place in range(7) if mask[row, place]]
    products = {at: np.eye(4) for at in places}
    for (name, mixer), (streams, (mixing, _, _)) in zip(mixers(model).items(), seen(model), strict=True):
        start = mixer.start_bias().numpy()[8:]
        start = reference.birkhoff(start, 4) if kind == "birkhoff" else reference.sinkhorn(start.reshape(4, 4), 20)
        np.testing.assert_allclose(start_matrix(mixer), start, atol=1e-12)
        values = {key: [] for key in report["sublayers"][name]}
        for at in places:
            one, x = mixing[at].double().numpy(), streams[at].double().numpy()
            products[at] = products[at] @ one
            values["row_error"].append(np.abs(one.sum(1) - 1).max())
            values["column_error"].append(np.abs(one.sum(0) - 1).max())
            values["from_start"].append(np.linalg.norm(one - start))
            values["from_identity"].append(np.linalg.norm(one - np.eye(4)))
            cosines = [
                x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j])
                for i, j in itertools.permutations(range(4), 2)
            ]
            values["stream_cosine"].append(np.mean(cosines))
        for key, numbers in values.items():
            expected = max(numbers) if key.endswith("error") else np.mean(numbers)
            assert report["sublayers"][name][key] == pytest.approx(expected, abs=2e-5), key
    for axis, key in ((1, "composite_gain_rows"), (0, "composite_gain_columns")):
        expected = np.mean([np.abs(product).sum(axis).max() for product in products.values()])
        assert report[key] == pytest.approx(expected, abs=1e-4)
    if kind == "birkhoff":
        assert report["composite_gain_rows"] == pytest.approx(1, abs=1e-5)


def test_padding_does_not_count():
    model = tiny(away=0.8)
    other = {**INPUTS, "input_ids": INPUTS["input_ids"] + 5 * (1 - INPUTS["attention_mask"])}
    one, same = full_report(model, INPUTS), full_report(model, other)
    assert one["gate_effect"] == pytest.approx(same["gate_effect"], rel=1e-4)
    for name, numbers in one["sublayers"].items():
        assert numbers == pytest.approx(same["sublayers"][name], rel=1e-3, abs=1e-6)


def test_the_effect_of_the_gate_is_a_kl_divergence():
    model, mask = tiny(away=0.8), INPUTS["attention_mask"].bool()
    with torch.no_grad():
        on, off = (model(**INPUTS, mhc_gate=gate).logits[mask].double().softmax(-1).numpy() for gate in (1.0, 0.0))
    expected = np.mean((on * np.log(on / off)).sum(1))
    assert expected > NO_EFFECT and gate_effect(model, INPUTS) == pytest.approx(expected, rel=1e-3)
    assert full_report(model, INPUTS)["verdicts"] == []


def test_a_fresh_model_has_no_effect_yet_and_one_with_a_stuck_h_res_never_will():
    (only,) = full_report(tiny(), INPUTS)["verdicts"]
    assert only.startswith("gate has no effect")
    stuck, effect = full_report(tiny(mhc_sinkhorn_tau=0.05, mhc_diagonal_bias=8.0), INPUTS)["verdicts"]
    assert stuck.startswith("H_res is the identity in 4 of 4") and effect.startswith("gate has no effect")
    assert len(verdicts({"sublayers": {}, "gate_effect": float("nan")})) == 1


def test_gradient_norms_are_split_by_what_they_move():
    model = tiny(away=0.5)
    assert all(value == 0 for parts in gradient_norms(model).values() for value in parts.values())
    model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    norms = gradient_norms(model)
    assert list(norms) == ["0.attn", "0.mlp", "1.attn", "1.mlp"]
    mixer = mixers(model)["1.attn"]
    expected = {
        "pre": mixer.bias.grad[:4],
        "post": mixer.bias.grad[4:8],
        "res": mixer.bias.grad[8:],
        "phi_pre": mixer.phi.grad[:4],
        "phi_post": mixer.phi.grad[4:8],
        "phi_res": mixer.phi.grad[8:],
        "scale": mixer.scale_bias.grad,
    }
    assert norms["1.attn"] == pytest.approx({key: value.norm().item() for key, value in expected.items()}, rel=1e-5)
    assert all(value > 0 for value in norms["1.attn"].values())


def test_a_report_leaves_the_model_as_it_was():
    model = tiny(away=0.5, mhc_gate_noise=1.0).train()
    before = torch.get_rng_state()
    full_report(model, INPUTS)
    assert model.training and torch.equal(torch.get_rng_state(), before)
    assert not any("get_matrices" in vars(mixer) for mixer in mixers(model).values())


def test_a_model_that_learns_to_use_h_res_is_not_flagged():
    """A flatter start than the default, so that the verdict goes away within seconds."""
    model = tiny("birkhoff", mhc_diagonal_bias=2.0).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    torch.manual_seed(1)
    for _ in range(301):
        first = torch.randint(3, 40, (16, 6))
        ids = torch.cat([first, first.flip(1)], dim=1)
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    report = full_report(model, INPUTS)
    moved = [numbers["from_start"] for numbers in report["sublayers"].values()]
    assert max(moved) > 0.1 and report["gate_effect"] > NO_EFFECT and report["verdicts"] == []
