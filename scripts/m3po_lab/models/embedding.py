# SPDX-License-Identifier: Apache-2.0
"""What a model makes of a text, as one vector."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers.m3po.flags import has_hyper_connections


@torch.no_grad()
def mean_state(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    """The mean over the tokens of each row of the last hidden state, under gate 1: (B, H) float32.

    Args:
        model: with its head or without.
        ids: (B, L) long.
        mask: (B, L), 0 at padding.
    """
    ones = {"mhc_gate": 1.0} if has_hyper_connections(model.base_model) else {}
    states = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False, **ones).last_hidden_state
    weights = mask.unsqueeze(-1).to(states.dtype)
    return ((states * weights).sum(1) / weights.sum(1)).float().cpu().numpy()
