# SPDX-License-Identifier: Apache-2.0
"""Linear layers by columns: the same product, in a rollout from a shared cache and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference.tiny import left_padded
from torch import nn
from transformers.m3po.generation import linear
from transformers.m3po.generation.linear import MOST_ROWS, by_columns
from transformers.m3po.shared_prefix import shared_prefill


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 24), (5, 1, 24), (3, 4, 24), (24,)])
def test_it_is_the_product(shape: tuple[int, ...], bias: bool):
    layer, states = nn.Linear(24, 7, bias=bias), torch.randn(*shape)
    expected = states.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0.0)
    product = by_columns(layer, states)
    assert product.is_contiguous()
    torch.testing.assert_close(product.double(), expected, atol=1e-6, rtol=1e-5)


def test_many_rows_are_left_to_torch(monkeypatch: pytest.MonkeyPatch):
    layer = nn.Linear(24, 7)
    monkeypatch.setattr(torch, "mm", None)
    states = torch.randn(MOST_ROWS + 1, 24)
    assert torch.equal(by_columns(layer, states), nn.functional.linear(states, layer.weight, layer.bias))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[nn.Linear]:
    """The layers that were called by columns, in order."""
    made: list[nn.Linear] = []

    def counted(layer: nn.Linear, states: torch.Tensor) -> torch.Tensor:
        made.append(layer)
        return by_columns(layer, states)

    monkeypatch.setattr(linear, "by_columns", counted)
    return made


def test_a_rollout_from_a_shared_cache_decodes_so_and_leaves_the_model_as_it_was(
    tiny_llama: Any, calls: list[nn.Linear]
):
    model = tiny_llama()
    given = {name: rows.repeat_interleave(2, 0) for name, rows in left_padded([5, 3]).items()}
    model.generate(**given, max_new_tokens=3, do_sample=False)
    assert not calls
    shared = shared_prefill(model, **given, num_paths=2)
    assert not calls
    model.lm_head.forward = own = lambda states: nn.Linear.forward(model.lm_head, states)
    model.generate(**given | shared, max_new_tokens=3, do_sample=False)
    layers = {layer for layer in model.modules() if isinstance(layer, nn.Linear)}
    assert set(calls) == layers - {model.lm_head}
    assert len(calls) == 2 * len(set(calls))  # not where the last prompt token is read
    assert model.lm_head.forward is own
    assert not any("forward" in vars(layer) for layer in set(calls))


def test_the_model_is_as_it_was_after_an_error_too(tiny_llama: Any):
    model = tiny_llama()
    given = {name: rows.repeat_interleave(2, 0) for name, rows in left_padded([5, 3]).items()}
    shared = shared_prefill(model, **given, num_paths=2)

    def stop(*args: Any) -> bool:
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        model.generate(**given | shared, max_new_tokens=3, stopping_criteria=[stop])
    assert not any("forward" in vars(layer) for layer in model.modules())
