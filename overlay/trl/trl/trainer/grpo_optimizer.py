# SPDX-License-Identifier: Apache-2.0
"""HRPO's residual gate in training: its parameters have learning rates of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.m3po.residual_gate import GATE_MODULES
from transformers.m3po.settings import RESIDUAL_MODES


def create_optimizer(trainer: Any, upstream: Callable[..., torch.optim.Optimizer], model: Any) -> torch.optim.Optimizer:
    """Hook of `GRPOTrainer.create_optimizer`: the gate's parameters get learning rates of their own.

    As in HRPO, the two linear layers and Λ are two more groups, both with the run's weight decay (biases and Λ
    included). An optimizer that the user passed in keeps its groups.
    """
    theirs = trainer.optimizer is not None
    optimizer = upstream(model)
    args = trainer.args
    if theirs or args.mode not in RESIDUAL_MODES:
        return optimizer
    named = [(name, weight) for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    layers = [weight for name, weight in named if any(module in name for module in GATE_MODULES[:2])]
    decay = [weight for name, weight in named if GATE_MODULES[2] in name]
    own = {id(weight) for weight in [*layers, *decay]}
    for group in optimizer.param_groups:
        group["params"] = [weight for weight in group["params"] if id(weight) not in own]
    rates = (args.thinking_residual_gate_learning_rate, args.thinking_residual_lambda_learning_rate)
    for weights, rate in zip((layers, decay), rates, strict=True):
        optimizer.add_param_group({"params": weights, "lr": rate, "weight_decay": args.weight_decay})
    return optimizer
