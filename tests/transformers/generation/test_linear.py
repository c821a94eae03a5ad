# SPDX-License-Identifier: Apache-2.0
"""Linear layers with packed weights: the same product, in a rollout from a shared cache and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference.tiny import left_padded
from torch import nn
from transformers.m3po.generation import linear
from transformers.m3po.generation.linear import packed_forward
from transformers.m3po.shared_prefix import shared_prefill

pytestmark = pytest.mark.skipif(not hasattr(torch.ops.mkl, "_mkl_linear"), reason="torch is built without MKL")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 24), (5, 1, 24), (3, 4, 24), (24,), (100, 1, 24)])
@torch.no_grad()
def test_it_is_the_product_for_any_number_of_rows(shape: tuple[int, ...], bias: bool):
    layer = nn.Linear(24, 7, bias=bias)
    packed = packed_forward(layer)
    for size in (shape, (2, *shape), shape):  # packed for the first; the second has more rows
        states = torch.randn(*size)
        expected = states.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0.0)
        torch.testing.assert_close(packed(states).double(), expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_a_weight_is_packed_once_and_used_so():
    layer, states = nn.Linear(24, 7), torch.randn(5, 24)
    packed = packed_forward(layer)
    first = packed(states)
    layer.weight.zero_()
    assert torch.equal(packed(states), first)


@torch.no_grad()
def test_under_autocast_and_of_another_dtype_it_is_torchs_own():
    layer, states = nn.Linear(24, 7), torch.randn(5, 24)
    packed = packed_forward(layer)
    packed(states)
    with torch.autocast("cpu", torch.bfloat16):
        for given in (states, states.bfloat16()):
            assert packed(given).dtype == torch.bfloat16
            assert torch.equal(packed(given), layer(given))
    with pytest.raises(RuntimeError, match="dtype"):
        packed(states.double())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[nn.Linear]:
    """The layers that were called with packed weights, in order."""
    made: list[nn.Linear] = []

    def counted(layer: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
        forward = packed_forward(layer)

        def call(states: torch.Tensor) -> torch.Tensor:
            made.append(layer)
            return forward(states)

        return call

    monkeypatch.setattr(linear, "packed_forward", counted)
    return made


def shared_prompts(model: Any) -> dict[str, Any]:
    """Arguments of `generate`: two groups of two rows, with a shared cache."""
    given = {name: rows.repeat_interleave(2, 0) for name, rows in left_padded([5, 3]).items()}
    return given | shared_prefill(model, **given, num_paths=2)


def test_a_rollout_from_a_shared_cache_decodes_so_and_leaves_the_model_as_it_was(
    tiny_llama: Any, calls: list[nn.Linear]
):
    model = tiny_llama()
    given = shared_prompts(model)
    plain = {name: given[name] for name in ("input_ids", "attention_mask")}
    model.generate(**plain, max_new_tokens=3, do_sample=False)
    assert not calls
    model.lm_head.forward = own = lambda states: nn.Linear.forward(model.lm_head, states)
    model.generate(**given, max_new_tokens=3, do_sample=False)
    layers = {layer for layer in model.modules() if isinstance(layer, nn.Linear)}
    assert set(calls) == layers - {model.lm_head}
    assert len(calls) == 2 * len(set(calls))  # not where the last prompt token is read
    assert model.lm_head.forward is own
    assert not any("forward" in vars(layer) for layer in set(calls))


def test_a_large_model_decodes_as_it_is(tiny_llama: Any, calls: list[nn.Linear], monkeypatch: pytest.MonkeyPatch):
    model = tiny_llama()
    total = sum(layer.weight.nbytes for layer in model.modules() if isinstance(layer, nn.Linear))
    monkeypatch.setattr(linear, "MOST_BYTES", total - 1)
    model.generate(**shared_prompts(model), max_new_tokens=3, do_sample=False)
    assert not calls
    monkeypatch.setattr(linear, "MOST_BYTES", total)
    model.generate(**shared_prompts(model), max_new_tokens=3, do_sample=False)
    assert calls


def test_a_rollout_under_autocast_is_the_one_without_packing(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch):
    """As Accelerate makes it, inside the model's forward, behind the hook."""
    model = tiny_llama()
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    given = shared_prompts(model)
    found = model.generate(**given, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True)
    monkeypatch.setattr(linear, "_serves", lambda layer: False)
    given = shared_prompts(model)
    plain = model.generate(**given, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(torch.stack(found.logits), torch.stack(plain.logits))


def test_weights_of_another_class_are_left_alone(tiny_llama: Any, calls: list[nn.Linear]):
    class Marked(torch.Tensor):
        pass

    model = tiny_llama()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().as_subclass(Marked))
    model.generate(**shared_prompts(model), max_new_tokens=3, do_sample=False)
    assert calls and model.lm_head not in calls


def test_weights_that_change_between_rollouts_are_packed_anew(tiny_llama: Any):
    model = tiny_llama()
    for _ in range(2):
        tokens = model.generate(**shared_prompts(model), max_new_tokens=8, do_sample=False)
        logits = model(tokens).logits  # by the plain layers; the shared prompts have padding in one group alone
        assert torch.equal(logits[:2, 4:-1].argmax(-1), tokens[:2, 5:])
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(torch.randn_like(weight) * 0.3)


def test_the_model_is_as_it_was_after_an_error_too(tiny_llama: Any):
    model = tiny_llama()
    given = shared_prompts(model)

    def stop(*args: Any) -> bool:
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        model.generate(**given, max_new_tokens=3, stopping_criteria=[stop])
    assert not any("forward" in vars(layer) for layer in model.modules())
