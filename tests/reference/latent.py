# SPDX-License-Identifier: Apache-2.0
"""What the tests of ASLR share: between a model with its modules and the float64 reference."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import Any

import torch
from reference import aslr
from reference.tiny import left_padded
from transformers.m3po.aslr.modules import ASLR_PARAMETERS, attach_aslr

SHORT = aslr.Numbers._fields
ON = {"aslr_enabled": True}
DEFAULTS = {
    "aslr_num_paths": 4,
    "aslr_max_iterations": 2,
    "aslr_threshold": 0.5,
    "aslr_gumbel_temp": 1.0,
    "aslr_cross_path_lambda": 0.1,
    "aslr_cross_path_temp": 0.1,
}
NAMES = {f"model.{name}" for name in ASLR_PARAMETERS}
SEEDS = [11, 2**31 - 1, 0]
CLOSE = 1e-5


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


def batch(lengths: tuple[int, ...] = (4, 2, 3)) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Left-padded tokens with their mask and position ids, and the arguments that make ASLR run on them."""
    tokens = left_padded(list(lengths), first=3, last=64)
    latent = {"is_m3po_inference": False, "aslr_row_seeds": torch.tensor(SEEDS[: len(lengths)])}
    return {**tokens, "position_ids": positions_of(tokens["attention_mask"])}, latent


def logits_of(model: Any, **inputs: Any) -> torch.Tensor:
    """Logits of `batch` with ASLR running, unless the inputs say otherwise."""
    tokens, latent = batch()
    with torch.no_grad():
        return model(**{**tokens, **latent, **inputs}).logits


def refined_with_trace(model: Any, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """last_hidden_state (B, L, H) and the trace (B, L, 3) of `batch`, and where its tokens are."""
    tokens, latent = batch()
    trace = torch.full((*tokens["input_ids"].shape, 3), torch.nan)
    with torch.no_grad():
        states = model.model(**tokens, **latent, aslr_trace=trace, **inputs).last_hidden_state
    return states, trace, tokens["attention_mask"].bool()


def assert_computes_the_same(one: torch.Tensor, other: torch.Tensor) -> None:
    """Equal weights, but not bit for bit: where a loaded tensor lies in memory decides how its sums are split."""
    rounding = 1e-6 if one.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(one, other, atol=rounding, rtol=rounding)


@contextlib.contextmanager
def logged_warnings() -> Iterator[list[str]]:
    """The warnings of `transformers.m3po.aslr.modules` as a list that fills; what was said once may be said again."""
    messages: list[str] = []
    logger, handler = logging.getLogger("transformers.m3po.aslr.modules"), logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.Logger.warning_once.cache_clear()
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
