# SPDX-License-Identifier: Apache-2.0
"""What the tests of ASLR share: between a model with its modules and the float64 reference."""

from __future__ import annotations

import copy
from typing import Any

import torch
from reference import aslr
from transformers.m3po.aslr.modules import ASLR_PARAMETERS, attach_aslr

SHORT = aslr.Numbers._fields


def aslr_parameters(model: Any) -> list[torch.nn.Parameter]:
    """The nine parameters, in the order of the reference."""
    return [model.base_model.get_parameter(name) for name in ASLR_PARAMETERS]


def randomise(model: Any, seed: int = 7, strength: float = 1.0) -> None:
    """Takes the modules away from their start, so far that every part of the loop moves the output."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in aslr_parameters(model):
            scale = p.shape[-1] ** -0.5 if p.dim() == 2 else 0.5
            p.add_(torch.randn(p.shape, generator=g) * scale * strength)


def with_aslr(plain: Any, random: bool = True, **numbers: Any) -> Any:
    """A copy of a plain model with the modules, away from their start unless `random` is false."""
    model = copy.deepcopy(plain)
    attach_aslr(model, **{f"aslr_{name}": value for name, value in numbers.items()})
    if random:
        randomise(model)
    return model


def reference_modules(model: Any) -> aslr.Modules:
    """The modules of a model, for the reference."""
    return aslr.Modules(*[p.detach().double().numpy() for p in aslr_parameters(model)])


def reference_numbers(model: Any, **overrides: Any) -> aslr.Numbers:
    """The numbers of a model's configuration, for the reference."""
    return aslr.Numbers(**({name: getattr(model.config, f"aslr_{name}") for name in SHORT} | overrides))


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """(B, L) long: the index of each token without padding; 0 on padding."""
    return (mask.cumsum(1) - 1).clamp_min(0)


def token_indices(mask: torch.Tensor) -> list[list[int | None]]:
    """The same for the reference: None on padding."""
    rows = zip(positions_of(mask).tolist(), mask.tolist(), strict=True)
    return [[k if real else None for k, real in zip(*row, strict=True)] for row in rows]
