# SPDX-License-Identifier: Apache-2.0
"""What is compiled by inductor, in one process: the compiler's own start takes longer than what is tested."""

from __future__ import annotations

import shutil

import pytest
import torch
from reference.hyper_models import gradients, trained
from transformers.m3po.aslr.noise import latent_noise

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler"),
]


def test_the_noise_is_the_same_through_inductor():
    """Its whole numbers must not be narrowed, nor its products overflow."""
    where = (torch.tensor([1, 2**31 - 1, 0]), torch.arange(12).view(3, 4), 4, 1, 32)
    compiled = torch.compile(latent_noise, fullgraph=True)(*where)
    torch.testing.assert_close(compiled, latent_noise(*where), atol=2e-6, rtol=2e-6)


def test_through_inductor_it_computes_the_same_with_finite_gradients():
    model = trained("NanoChat", num_hidden_layers=1).train()
    ids = torch.randint(3, 256, (2, 8))
    loss = gradients(model, ids)
    expected = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    output = torch.compile(model, fullgraph=True)(input_ids=ids, labels=ids, use_cache=False)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(loss, abs=1e-5)
    for name, value in model.named_parameters():
        assert value.grad.isfinite().all()
        torch.testing.assert_close(value.grad, expected[name], atol=1e-5, rtol=1e-4)
