# SPDX-License-Identifier: Apache-2.0
"""The modules of this overlay compute in float32 whatever the model's dtype."""

from __future__ import annotations

from typing import Any

import torch


def linear(layer: Any, values: torch.Tensor) -> torch.Tensor:
    """A linear layer on (..., H) -> (..., H') float32, in the layer's own dtype.

    That is float32, unless somebody has cast the whole model, or an engine hands out its parameters in another dtype
    (FSDP2 with a bf16 policy, ZeRO-3 in bf16).

    Raises:
        ValueError: the layer was quantised.
    """
    if not layer.weight.is_floating_point():
        raise ValueError(
            f"a layer of the residual gate or of ASLR was quantised to {layer.weight.dtype}: load the plain model "
            "quantised and let the trainer add the modules, or name them among those that quantisation leaves out "
            "(llm_int8_skip_modules)."
        )
    return layer(values.to(layer.weight.dtype)).float()
