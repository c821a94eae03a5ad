# SPDX-License-Identifier: Apache-2.0
"""What the tests of modes hrpo and h3po share: between a model with a residual gate and the float64 reference."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from reference import thinking_residual
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

# A gate that lets so much thought in that a wrong thought changes the log-probs by far more than rounding does.
STRONG = {"thinking_residual_enabled": True, "thinking_residual_r_min": 0.3, "thinking_residual_r_max": 0.6}
PARAMETERS = (
    "thinking_residual_gate_r.weight",
    "thinking_residual_gate_r.bias",
    "thinking_residual_gate_i.weight",
    "thinking_residual_gate_i.bias",
    "thinking_residual_Lambda.Lambda",
)


@functools.cache
def narrow_tokenizer() -> PreTrainedTokenizerFast:
    """28 tokens (pad 0, bos 1, eos 2), a third of them with a `#`: small enough to keep whole distributions."""
    marks = ["#", "##", "###", "####", "a#", "#b", "##c", "Ġ##"]
    tokens = ["<pad>", "<s>", "</s>", *marks, "Ġ", *"0123456789abcdef"]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def gate_parameters(model: Any) -> list[torch.nn.Parameter]:
    """The gate's five parameters, in the order of the reference."""
    return [model.base_model.get_parameter(name) for name in PARAMETERS]


def reference_gate(model: Any) -> thinking_residual.Gate:
    """The gate of a model, for the reference: float64 copies that want gradients."""
    return thinking_residual.Gate(*[p.detach().double().requires_grad_() for p in gate_parameters(model)])


class Norm64(torch.nn.Module):
    """RMSNorm in the dtype it gets; upstream's computes in float32."""

    def __init__(self, weight: torch.Tensor, eps: float):
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()


def in_float64(model: Any) -> Any:
    """A copy of a model that computes in float64 throughout (its attention must not be `eager`, which does not)."""
    twin = copy.deepcopy(model).double().requires_grad_(False)
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, name, Norm64(child.weight, child.variance_epsilon))
    return twin


def bag_of(ids: torch.Tensor, weights: torch.Tensor) -> dict[int, float]:
    """One bag (K,) as `{id: weight}`: equal ids added up, entries of weight 0 left out."""
    bag: dict[int, float] = {}
    for k, w in zip(ids.tolist(), weights.tolist(), strict=True):
        if w != 0:
            bag[k] = bag.get(k, 0.0) + w
    return bag


def assert_same_bag(mine: dict[int, float], theirs: dict[int, torch.Tensor], tolerance: float) -> None:
    """Weights agree id by id; an id that only one of them has counts as weight 0 in the other."""
    for k in mine.keys() | theirs.keys():
        gap = abs(mine.get(k, 0.0) - float(theirs.get(k, 0.0)))
        assert gap <= tolerance, f"token {k}: {mine.get(k, 0.0)} instead of {float(theirs.get(k, 0.0))}"
