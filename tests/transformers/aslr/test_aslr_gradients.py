# SPDX-License-Identifier: Apache-2.0
"""The gradient of ASLR's modules: from every position, and that of finite differences of the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import aslr
from reference.latent import (
    aslr_parameters,
    batch,
    reference_modules,
    reference_numbers,
    token_indices,
    with_aslr,
)
from transformers.m3po import hooks
from transformers.m3po.aslr import modules as product
from transformers.m3po.aslr.modules import ASLR_PARAMETERS, refine_states
from transformers.m3po.aslr.noise import latent_noise

pytestmark = pytest.mark.usefixtures("one_thread")


def policy_loss(model, **inputs):
    """The loss of a policy pass, whose last logits predict nothing."""
    tokens, latent = batch()
    logits = model(**tokens, **latent, **inputs).logits[:, :-1]
    pull = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    return (logits * pull * tokens["attention_mask"][:, :-1, None]).sum()


def gradients(model, loss):
    """The gradients of the nine parameters, by name."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in zip(ASLR_PARAMETERS, aslr_parameters(model), strict=True)}


def alive(found):
    """The names whose gradient is not zero; none may be missing."""
    assert all(grad is not None and grad.isfinite().all() for grad in found.values())
    return {name for name, grad in found.items() if grad.any()}


PROJECTION = {"m3po_path_aggregator.weight_proj.weight", "m3po_path_aggregator.weight_proj.bias"}


@pytest.mark.all_families
def test_at_the_start_the_projection_gets_gradient_and_from_then_on_every_module(make):
    model = with_aslr(make(), random=False)
    optimizer = torch.optim.AdamW(aslr_parameters(model), lr=1e-2)
    for expected in (PROJECTION, set(ASLR_PARAMETERS)):
        assert alive(gradients(model, policy_loss(model))) == expected
        optimizer.step()


@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_every_module_gets_gradient_from_every_position(make, position):
    model = with_aslr(make())
    tokens, latent = batch((4, 4, 4))
    loss = model(**tokens, **latent).logits[:, position].square().sum()
    assert alive(gradients(model, loss)) == set(ASLR_PARAMETERS)


def last_position_only(model, states, position_ids, inputs):
    """Refines the state that the next token is sampled from, and no other."""
    last = refine_states(model, states[:, -1:], position_ids[:, -1:], inputs)
    return torch.cat([states[:, :-1], last], dim=1)


def test_refining_the_last_position_alone_gets_no_gradient_from_a_policy_pass(make, monkeypatch):
    """The logit of that position is dropped there: what the test above guards against, put in on purpose."""
    model = with_aslr(make())
    monkeypatch.setattr(hooks, "refine_states", last_position_only)
    assert alive(gradients(model, policy_loss(model))) == set()


def test_the_gradient_is_that_of_finite_differences_of_the_reference(make):
    """A few entries of each parameter, and of the states."""
    model = with_aslr(make(), cross_path_lambda=0.4, cross_path_temp=1.0)
    tokens, latent = batch((2, 1))
    g = torch.Generator().manual_seed(3)
    states = torch.randn(2, 2, 32, generator=g).requires_grad_()
    mask = tokens["attention_mask"]
    pull = torch.randn(2, 2, 32, generator=g) * mask[..., None]
    loss = (refine_states(model.model, states, tokens["position_ids"], latent) * pull).sum()
    found = gradients(model, loss)
    seeds, indices = latent["aslr_row_seeds"].tolist(), token_indices(mask)
    modules, numbers, start = reference_modules(model), reference_numbers(model), states.detach().double().numpy()

    def loss_at(states, modules):
        return float((aslr.refine(states, seeds, indices, modules, numbers).states * pull.double().numpy()).sum())

    def slope(values, place, at, h=1e-5):
        ends = []
        for step in (h, -h):
            moved = values.copy()
            moved[place] += step
            ends.append(at(moved))
        return (ends[0] - ends[1]) / (2 * h)

    for name, field, grad in zip(ASLR_PARAMETERS, aslr.Modules._fields, found.values(), strict=True):
        # The entries of the largest gradient say the most; the first and the last are where a slice goes wrong.
        flat = grad.abs().flatten()
        for k in {0, flat.numel() - 1, int(flat.argmax())}:
            place = np.unravel_index(k, grad.shape)
            values = getattr(modules, field)
            expected = slope(
                values, place, lambda moved, field=field: loss_at(start, modules._replace(**{field: moved}))
            )
            assert grad[place].item() == pytest.approx(expected, rel=1e-4, abs=1e-5 * max(1, float(flat.max()))), name
    for place in [(0, 0, 3), (0, 1, 31), (1, 1, 0)]:
        expected = slope(start, place, lambda moved: loss_at(moved, modules))
        assert states.grad[place].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(make, monkeypatch, seeded, reentrant):
    model, calls = with_aslr(make()).train(), []
    model.enable_input_require_grads()
    monkeypatch.setattr(product, "latent_noise", lambda *args: (calls.append(1), latent_noise(*args))[1])
    found = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(3)
        tokens, latent = batch()
        logits = model(**tokens, **(latent if seeded else {"is_m3po_inference": False}), use_cache=False).logits
        loss = logits[:, :-1].square().sum()
        model.zero_grad(set_to_none=True)
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert len(calls) == 2 + 4, "a round each, and once more in the backward pass"
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-6, rtol=1e-5)
