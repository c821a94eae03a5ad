# SPDX-License-Identifier: Apache-2.0
"""The parameter groups of the residual gate and of a learnable gating function, which learn at rates of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.m3po.gating.module import GATING_MODULE
from transformers.m3po.modules import GATING, RESIDUAL_GATE
from transformers.m3po.thinking.residual_gate import RESIDUAL_GATE_MODULES

from .modules import wanted_modules


def create_optimizer(trainer: Any, upstream: Callable[..., torch.optim.Optimizer], model: Any) -> torch.optim.Optimizer:
    """Hook of `GRPOTrainer.create_optimizer`: more groups for the parameters that have learning rates of their own.

    As in HRPO, the residual gate's two linear layers and its Λ are two groups, both with the run's weight decay (biases
    and Λ included). A learnable gating function is one group without weight decay, which would pull it to where all
    weights are alike. An optimizer that the user passed in keeps its groups.
    """
    theirs = trainer.optimizer is not None
    optimizer = upstream(model)
    own = [] if theirs else _own_groups(trainer.args)
    if not own:
        return optimizer
    named = [(name, weight) for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    for names, rate, decay in own:
        weights = [weight for name, weight in named if any(module in name for module in names)]
        if not weights:
            continue
        taken = {id(weight) for weight in weights}
        for group in optimizer.param_groups:
            group["params"] = [weight for weight in group["params"] if id(weight) not in taken]
        optimizer.add_param_group({"params": weights, "lr": rate, "weight_decay": decay})
    return optimizer


def _own_groups(args: Any) -> list[tuple[tuple[str, ...], float, float]]:
    """Module names, learning rate and weight decay of each group."""
    wanted, groups = wanted_modules(args), []
    if RESIDUAL_GATE in wanted:
        groups += [
            (RESIDUAL_GATE_MODULES[:2], args.thinking_residual_gate_learning_rate, args.weight_decay),
            (RESIDUAL_GATE_MODULES[2:], args.thinking_residual_lambda_learning_rate, args.weight_decay),
        ]
    if GATING in wanted:
        groups.append(((GATING_MODULE,), args.gating_learning_rate, 0.0))
    return groups
