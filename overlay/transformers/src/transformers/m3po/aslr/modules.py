# SPDX-License-Identifier: Apache-2.0
"""ASLR: an inner loop on the final hidden state, at every position.

With s the hidden state after the last norm, ρ its RMS and z = s / ρ:

    g = sigmoid(w · s + b)                                    router
    x_p = z + σ n(p, 0)                                       P latent paths, σ = 0.1 aslr_gumbel_temp
    y_p = x_p + [r > 0] σ n(p, r)                             round r = 0 ... R - 1: fresh noise for what is heard,
    x_p ← (1 - λ) x_p + λ collaborator(y)_p                   and the path collaborator, attention among the P paths
    s' = s + sigmoid(10 (g - threshold)) ρ (W Σ_p softmax(a)_p x_p + c)     path aggregator, let in by the router

n is `latent_noise`. The modules start as the identity: the collaborator's four projections are unit matrices, so that a
path begins by listening to those like it, and W = 0 and c = 0, so that s' is s bit for bit; W and c get gradient at
once and the rest from the second step, as with LoRA. A blend of s with its aggregate, would carry the
noise into the output from the start. All of it is float32 whatever the model's dtype
(an engine that hands out parameters in bf16 is the exception, see `float32`).

Axes besides those of the package: P latent paths, R rounds.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import nn

from ... import initialization as init
from ...utils import logging
from ..debugging import debugging, log_latent_paths
from ..flags import check_aslr_overrides, has_aslr
from ..float32 import linear
from .noise import latent_noise
from .settings import ASLR_HYPERPARAMETERS, NUM_HEADS, ASLRHyperparameters, check_aslr_hyperparameters

logger = logging.get_logger(__name__)

ASLR_MODULES = ("m3po_router", "m3po_path_collaborator", "m3po_path_aggregator")
# The parameters of a checkpoint that has the modules, by their names on the base model.
ASLR_PARAMETERS = (
    *(f"m3po_router.gate.{part}" for part in ("weight", "bias")),
    *(f"m3po_path_collaborator.{layer}.{part}" for layer in ("in_proj", "out_proj") for part in ("weight", "bias")),
    "m3po_path_aggregator.weight",
    *(f"m3po_path_aggregator.weight_proj.{part}" for part in ("weight", "bias")),
)
# What the forward of a model takes for ASLR besides the overrides `ASLR_HYPERPARAMETERS`.
ASLR_INPUTS = ("is_m3po_inference", "aslr_row_seeds", "aslr_trace", *ASLR_HYPERPARAMETERS)
# RMS of the noise over that of the state at aslr_gumbel_temp=1: attention among the paths is then neither uniform nor
# one-hot at the default temperature (docs/aslr.md).
NOISE_SCALE = 0.1
ROUTER_SLOPE = 10.0  # of the sigmoid that turns the score into how much of the refinement is let in
MAX_SEED = 1 << 31


class M3PORouter(nn.Module):
    """Says how much a position needs the loop: one linear layer and a sigmoid, 0.5 everywhere at the start.

    Args:
        config: of the model, for `hidden_size`, H.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, 1, dtype=torch.float32)
        self.m3po_init_weights()

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(..., H) float32 -> the score g (..., 1) float32 in (0, 1)."""
        return torch.sigmoid(linear(self.gate, states))

    @torch.no_grad()
    def m3po_init_weights(self, model: Any = None) -> None:
        """The start; what was loaded from a checkpoint is left alone."""
        init.zeros_(self.gate.weight)
        init.zeros_(self.gate.bias)


class M3POPathCollaborator(nn.Module):
    """Attention of each latent path of a position over all P of them, with eight heads.

    Args:
        config: of the model, for `hidden_size`, H, a multiple of 8.
    """

    def __init__(self, config: Any):
        super().__init__()
        size = config.hidden_size
        self.in_proj = nn.Linear(size, 3 * size, dtype=torch.float32)  # queries, keys, values
        self.out_proj = nn.Linear(size, size, dtype=torch.float32)
        self.m3po_init_weights()

    def forward(self, paths: torch.Tensor, temperature: float) -> torch.Tensor:
        """What each path hears: (..., P, H) float32 -> (..., P, H) float32.

        Args:
            paths: the latent paths, in units of the state's RMS.
            temperature: divides the attention's logits (`aslr_cross_path_temp`), above 0.
        """
        heads = (*paths.shape[:-1], 3, NUM_HEADS, paths.shape[-1] // NUM_HEADS)
        queries, keys, values = linear(self.in_proj, paths).view(heads).transpose(-4, -2).unbind(-3)
        scale = 1.0 / (math.sqrt(heads[-1]) * temperature)
        weights = (queries * scale @ keys.transpose(-1, -2)).softmax(-1)  # (..., heads, P, P)
        return linear(self.out_proj, (weights @ values).transpose(-3, -2).flatten(-2))

    @torch.no_grad()
    def m3po_init_weights(self, model: Any = None) -> None:
        """The start; what was loaded from a checkpoint is left alone."""
        weight = self.in_proj.weight
        init.copy_(weight, torch.eye(weight.shape[1], device=weight.device).repeat(3, 1))
        init.eye_(self.out_proj.weight)
        init.zeros_(self.in_proj.bias)
        init.zeros_(self.out_proj.bias)


class M3POPathAggregator(nn.Module):
    """Weighs the P latent paths of a position into one vector and projects it; 0 at the start.

    Args:
        config: of the model, for `hidden_size`, H, and `aslr_num_paths`, P.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.aslr_num_paths, dtype=torch.float32))
        self.weight_proj = nn.Linear(config.hidden_size, config.hidden_size, dtype=torch.float32)
        self.m3po_init_weights()

    def forward(self, paths: torch.Tensor) -> torch.Tensor:
        """The refinement W Σ_p softmax(a)_p x_p + c: (..., P, H) float32 -> (..., H) float32.

        Raises:
            ValueError: there are more or fewer paths than the weights are for.
        """
        if paths.shape[-2] != self.weight.shape[0]:
            raise ValueError(
                f"aslr_num_paths={paths.shape[-2]}: this path aggregator was built for {self.weight.shape[0]}."
            )
        shares = self.weight.float().softmax(-1)
        return linear(self.weight_proj, (shares.unsqueeze(-1) * paths).sum(-2))

    @torch.no_grad()
    def m3po_init_weights(self, model: Any = None) -> None:
        """The start; what was loaded from a checkpoint is left alone."""
        init.ones_(self.weight)
        init.zeros_(self.weight_proj.weight)
        init.zeros_(self.weight_proj.bias)


def add_aslr(model: Any) -> None:
    """Makes the modules on a base model if its configuration has them; every model gets the same start.

    Raises:
        ValueError: a number of the configuration breaks its rule.
    """
    if not has_aslr(model):
        return
    config = model.config
    check_aslr_hyperparameters({name: getattr(config, name) for name in ASLR_HYPERPARAMETERS}, config.hidden_size)
    model.m3po_router = M3PORouter(config)
    model.m3po_path_collaborator = M3POPathCollaborator(config)
    model.m3po_path_aggregator = M3POPathAggregator(config)


def attach_aslr(model: Any, **hyperparameters: Any) -> None:
    """Gives a plain model the modules in their start (in place); torch's generators are left alone.

    Args:
        model: a Llama or Qwen2 model, with or without its head; its configuration is changed too.
        **hyperparameters: any of `ASLR_HYPERPARAMETERS`; the others are the configuration's.

    Raises:
        ValueError: a number breaks its rule.
    """
    base = model.base_model
    values = {name: getattr(base.config, name) for name in ASLR_HYPERPARAMETERS} | hyperparameters
    check_aslr_hyperparameters(values, base.config.hidden_size)
    for config in {id(net.config): net.config for net in (model, base)}.values():
        config.aslr_enabled = True
        for name, value in values.items():
            setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):  # a layer draws a start of its own, which is replaced
        add_aslr(base)
    for name in ASLR_MODULES:
        getattr(base, name).to(base.norm.weight.device)  # where the states come from


def runs_aslr(is_m3po_inference: bool | None) -> bool:
    """Whether ASLR runs: not at inference; unset means that it does, which is said once."""
    if is_m3po_inference is None and not torch.compiler.is_compiling():
        logger.warning_once(
            "is_m3po_inference is not set: ASLR runs. Set it to True to decode without the loop, to False to silence "
            "this line."
        )
    return not is_m3po_inference


def check_row_seeds(row_seeds: torch.Tensor, rows: int) -> None:
    """Refuses anything but one whole number for each row.

    Raises:
        ValueError: shape or dtype is another.
    """
    if row_seeds.shape != (rows,) or row_seeds.is_floating_point() or row_seeds.dtype == torch.bool:
        raise ValueError(
            f"aslr_row_seeds of shape {tuple(row_seeds.shape)} and dtype {row_seeds.dtype} for {rows} rows: give a 1-D "
            "tensor with one integer per row."
        )


def pop_aslr_inputs(forward_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Hook at the top of the forward: what is meant for `refine_states`, taken out so that no layer sees it."""
    return {name: forward_kwargs.pop(name) for name in ASLR_INPUTS if name in forward_kwargs}


def refine_states(
    model: Any, hidden_states: torch.Tensor, position_ids: torch.Tensor, inputs: dict[str, Any]
) -> torch.Tensor:
    """Hook at the end of `LlamaModel.forward` and `Qwen2Model.forward`: the states with their refinement.

    Args:
        model: the base model.
        hidden_states: (B, L, H) after the last norm, any floating dtype.
        position_ids: (B, L) or (1, L) long, the tokens' own indices without padding; the noise depends on them.
        inputs: of `pop_aslr_inputs`. `is_m3po_inference`: True skips the loop. `aslr_row_seeds`: (B,) integers, one
            for each row; missing ones are drawn from torch's generator. `aslr_trace`: (B, T, 3) float32, written for
            the *last* T positions: the score g, and the spread of the latent paths (`path_spread`) after expansion and
            after the last round. The others override the hyperparameters of the configuration for this call.

    Returns:
        (B, L, H) in the dtype of `hidden_states`; the very tensor that came in where ASLR is off, at inference, and
        with P = 1 or R = 0.

    Raises:
        ValueError: see `check_aslr_overrides` and `check_row_seeds`.
    """
    overrides = {name: inputs[name] for name in ASLR_HYPERPARAMETERS if inputs.get(name) is not None}
    check_aslr_overrides(model, overrides)
    if not has_aslr(model) or not runs_aslr(inputs.get("is_m3po_inference")):
        return hidden_states
    hyperparameters = ASLRHyperparameters.of(model.config, overrides)
    if not hyperparameters.runs:
        return hidden_states
    seeds = inputs.get("aslr_row_seeds")
    if seeds is not None:
        check_row_seeds(seeds, hidden_states.shape[0])
    elif hyperparameters.gumbel_temp > 0:
        seeds = torch.randint(MAX_SEED, hidden_states.shape[:1], device=hidden_states.device)
    loop = partial(_inner_loop, model, position_ids, seeds, hyperparameters, inputs.get("aslr_trace"))
    if model.gradient_checkpointing and model.training and torch.is_grad_enabled():
        return model._gradient_checkpointing_func(loop, hidden_states)  # the noise is the same when it is done again
    return loop(hidden_states)


def _inner_loop(
    model: Any,
    position_ids: torch.Tensor,
    seeds: torch.Tensor | None,
    hyperparameters: ASLRHyperparameters,
    trace: torch.Tensor | None,
    hidden_states: torch.Tensor,
) -> torch.Tensor:
    """Router, expansion, rounds, aggregation: the equations of this module."""
    with torch.autocast(hidden_states.device.type, enabled=False):
        states = hidden_states.float()
        scale = states.square().mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny).sqrt()
        score = model.m3po_router(states)
        paths = (states / scale).unsqueeze(-2).expand(-1, -1, hyperparameters.num_paths, -1)
        paths = expanded = _noisy(paths, position_ids, seeds, hyperparameters, 0)
        for round_index in range(hyperparameters.max_iterations):
            heard = _noisy(paths, position_ids, seeds, hyperparameters, round_index) if round_index else paths
            heard = model.m3po_path_collaborator(heard, hyperparameters.cross_path_temp)
            paths = torch.lerp(paths, heard, hyperparameters.cross_path_lambda)
        share = torch.sigmoid(ROUTER_SLOPE * (score - hyperparameters.threshold))
        refined = states + share * scale * model.m3po_path_aggregator(paths)
    if debugging() and not torch.compiler.is_compiling():
        log_latent_paths(hyperparameters, score.squeeze(-1), (path_spread(expanded), path_spread(paths)))
    if trace is not None:
        tail = slice(states.shape[1] - trace.shape[1], None)
        spreads = [path_spread(latent[:, tail]) for latent in (expanded, paths)]
        trace.copy_(torch.stack([score[:, tail, 0], *spreads], dim=-1))
    return refined.to(hidden_states.dtype)


def _noisy(
    paths: torch.Tensor,
    position_ids: torch.Tensor,
    seeds: torch.Tensor | None,
    hyperparameters: ASLRHyperparameters,
    round_index: int,
) -> torch.Tensor:
    """The latent paths (B, L, P, H) with the noise of a round on them."""
    if seeds is None or hyperparameters.gumbel_temp == 0:
        return paths
    noise = latent_noise(seeds, position_ids, hyperparameters.num_paths, round_index, paths.shape[-1])
    return paths + NOISE_SCALE * hyperparameters.gumbel_temp * noise


def path_spread(paths: torch.Tensor) -> torch.Tensor:
    """How far the latent paths lie apart: RMS distance from their mean, (..., P, H) -> (...) float32.

    In units of the state's RMS: 0 when they are equal, about 0.087 with the noise of P = 4 at aslr_gumbel_temp=1.
    """
    return paths.var(-2, correction=0).mean(-1).sqrt()
