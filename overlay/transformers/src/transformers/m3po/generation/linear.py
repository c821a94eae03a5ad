# SPDX-License-Identifier: Apache-2.0
"""Linear layers of a decode step on a CPU, in fp32: the weight is packed once for all steps of a rollout.

MKL rearranges a weight for its kernel in every product; for the few rows of a decode step that is much of the time.
Here it is rearranged at the first step and kept in that form, a copy, until the rollout has ended: the same product in
less time (benchmarks/decode_step.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..shared_cache import SharedCache

MOST_BYTES = 4 * 2**30  # of packed weights; a larger model decodes as it is


def packed_forward(layer: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    """The forward of `layer`, (..., in features) -> (..., out features), for calls without gradient.

    Its first call packs the weight for as many rows as that one has; a call of more or of fewer rows takes the weight,
    and one under autocast or of another dtype is torch's own. The weight must not change between calls.
    """
    packed: torch.Tensor | None = None
    packed_rows = 0

    def forward(states: torch.Tensor) -> torch.Tensor:
        nonlocal packed, packed_rows
        if states.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return nn.functional.linear(states, layer.weight, layer.bias)
        if packed is None:
            packed_rows = states.numel() // layer.in_features
            packed = torch.ops.mkl._mkl_reorder_linear_weight.default(layer.weight, packed_rows)
        return torch.ops.mkl._mkl_linear.default(states, packed, layer.weight, layer.bias, packed_rows)

    return forward


def _serves(layer: nn.Module) -> bool:
    """Whether it is a linear layer whose forward is torch's own and whose weight is a plain tensor, fp32 on a CPU."""
    if type(layer) is not nn.Linear or "forward" in vars(layer):
        return False
    weight = layer.weight.detach()  # of a quantized or distributed weight its own class of tensors
    return type(weight) is torch.Tensor and weight.dtype == torch.float32 and weight.device.type == "cpu"


@contextmanager
def optimize_linear_layers(model: Any, model_kwargs: dict[str, Any]) -> Iterator[None]:
    """Hook around the loop of `_sample`: a rollout from a shared cache decodes with packed weights, nothing else."""
    layers: list[nn.Linear] = []
    if isinstance(model_kwargs.get("past_key_values"), SharedCache) and hasattr(torch.ops.mkl, "_mkl_linear"):
        layers = [each for each in model.modules() if _serves(each)]
        if sum(layer.weight.nbytes for layer in layers) > MOST_BYTES:
            layers = []
    for layer in layers:
        vars(layer)["forward"] = packed_forward(layer)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]
