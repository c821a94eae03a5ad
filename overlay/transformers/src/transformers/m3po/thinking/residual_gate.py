# SPDX-License-Identifier: Apache-2.0
"""HRPO's residual gate (arXiv 2505.18454, section 3): how much of a thinking input is token and how much is thought.

    r = σ(W_r e + b_r),  i = σ(W_i e + b_i),  a = exp(-c · softplus(-Λ) · r),  c = 8
    input = a ⊙ e + sqrt(1 - a² + 1e-8) ⊙ (i ⊙ h)

e is the embedding of the sampled token, h the soft thought (`thoughts`). The sign before Λ is that of HRPO's code; its
paper prints softplus(Λ). All is float32 whatever the model's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ... import initialization as init
from ..flags import check_bounds, has_residual_gate
from ..float32 import linear

# The gate's modules on the base model, in HRPO's names; a checkpoint with the gate has all of their parameters.
RESIDUAL_GATE_MODULES = ("thinking_residual_gate_r", "thinking_residual_gate_i", "thinking_residual_Lambda")
RESIDUAL_GATE_PARAMETERS = (
    *(f"{name}.{part}" for name in RESIDUAL_GATE_MODULES[:2] for part in ("weight", "bias")),
    "thinking_residual_Lambda.Lambda",
)
DECAY_CONSTANT = 8.0  # c


class ThinkingResidualLambda(nn.Module):
    """Λ (H,) float32 and the decay a it makes of the gate r.

    Args:
        hidden_size: H.
        r_min, r_max: the start draws exp(-c · softplus(-Λ)) evenly between them, in (0, 1).
    """

    def __init__(self, hidden_size: int, r_min: float, r_max: float):
        super().__init__()
        check_bounds(r_min, r_max)
        self.r_min, self.r_max = r_min, r_max
        self.Lambda = nn.Parameter(torch.empty(hidden_size, dtype=torch.float32))

    def forward(self, gate: torch.Tensor) -> torch.Tensor:
        """a = exp(-c · softplus(-Λ) · r): r (..., H) -> (..., H) float32 in (0, 1)."""
        return torch.exp(-DECAY_CONSTANT * F.softplus(-self.Lambda.float()) * gate.float())

    @torch.no_grad()
    def reset_lambda_parameters(
        self, r_min: float | None = None, r_max: float | None = None, generator: torch.Generator | None = None
    ) -> None:
        """Draws Λ anew: u ~ U(r_min, r_max), Λ = -log(u^(-1/c) - 1). Leaves alone what was loaded from a checkpoint."""
        self.r_min = self.r_min if r_min is None else r_min
        self.r_max = self.r_max if r_max is None else r_max
        check_bounds(self.r_min, self.r_max)
        if self.Lambda.is_meta or getattr(self.Lambda, "_is_hf_initialized", False):
            return
        drawn = torch.empty(self.Lambda.shape, dtype=torch.float64)
        drawn.uniform_(self.r_min, self.r_max, generator=generator)
        init.copy_(self.Lambda, -torch.log(torch.expm1(-torch.log(drawn) / DECAY_CONSTANT)).to(self.Lambda))

    def m3po_init_weights(self, model: Any) -> None:
        """What the hook in `_init_weights` calls."""
        self.reset_lambda_parameters()


def add_residual_gate(model: Any) -> None:
    """Makes the gate's modules on a base model if its configuration has them.

    W_r and W_i start as any linear layer of the model (normal with `initializer_range`, bias 0), Λ by its own rule.
    """
    if not has_residual_gate(model):
        return
    config = model.config
    for name in RESIDUAL_GATE_MODULES[:2]:
        setattr(model, name, nn.Linear(config.hidden_size, config.hidden_size, dtype=torch.float32))
    decay = ThinkingResidualLambda(config.hidden_size, config.thinking_residual_r_min, config.thinking_residual_r_max)
    model.thinking_residual_Lambda = decay


def thinking_residual(model: Any, embeds: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixes thoughts into token embeddings; `model.thinking_residual` calls it.

    Args:
        model: the base model with the gate.
        embeds: e (..., H), any floating dtype.
        residual: h (..., H).

    Returns:
        mixed (..., H) in the dtype of `embeds`, computed in float32, and a (..., H) float32.
    """
    with torch.autocast(embeds.device.type, enabled=False):
        own = embeds.float()
        gate = torch.sigmoid(linear(model.thinking_residual_gate_r, own))
        share = torch.sigmoid(linear(model.thinking_residual_gate_i, own))
        decay = model.thinking_residual_Lambda(gate)
        mixed = decay * own + torch.sqrt(1.0 - decay.square() + 1e-8) * (share * residual.float())
    return mixed.to(embeds.dtype), decay


def attach_residual_gate(model: Any, r_min: float, r_max: float, seed: int) -> None:
    """Gives a plain model a fresh gate (in place), the same one for the same seed; torch's generator is left alone.

    Args:
        model: a Llama or Qwen2 model, with or without its head; its configuration is changed too.
        r_min, r_max: see `ThinkingResidualLambda`.
        seed: of the gate's start.
    """
    base = model.base_model
    for config in {id(net.config): net.config for net in (model, base)}.values():
        config.thinking_residual_enabled = True
        config.thinking_residual_r_min, config.thinking_residual_r_max = r_min, r_max
    with torch.random.fork_rng(devices=[]):  # a layer draws a start of its own, which is replaced below
        add_residual_gate(base)
    generator = torch.Generator().manual_seed(seed)
    where = base.embed_tokens.weight.device
    for name in RESIDUAL_GATE_MODULES[:2]:
        layer = getattr(base, name)
        nn.init.normal_(layer.weight, std=base.config.initializer_range, generator=generator)
        nn.init.zeros_(layer.bias)
        layer.to(where)
    base.thinking_residual_Lambda.reset_lambda_parameters(generator=generator)
    base.thinking_residual_Lambda.to(where)
