# SPDX-License-Identifier: Apache-2.0
"""HRPO's residual gate in training: made before the adapter is laid on, saved with it, at its own learning rates."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers.m3po.residual_gate import (
    GATE_MODULES,
    attach_residual_gate,
    copy_residual_gate,
    has_residual_gate,
)
from transformers.m3po.settings import RESIDUAL_MODES

from .grpo_m3po_config import check_model_type

# The flags that say what a fresh gate starts with; of a model that has one, its config says it.
GATE_START = ("thinking_residual_r_min", "thinking_residual_r_max")


def prepare_policy(model: Any, args: Any, peft_config: PeftConfig | None) -> PeftConfig | None:
    """Hook of `GRPOTrainer.__init__`, before the adapter: gives the model the modules that the mode trains.

    Args:
        model: the policy; in the modes `hrpo` and `h3po` a plain one gets a fresh gate (in place) that depends on
            `args.seed` alone, so that a resumed run has the same reference.
        args: the `GRPOConfig`.
        peft_config: the adapter that will be laid on, if any.

    Returns:
        The adapter's configuration; in these modes a copy that trains and saves the gate whole (PEFT lays no LoRA on
        what it saves whole).

    Raises:
        ValueError: the model and the mode contradict each other, or DeepSpeed brings an optimizer of its own.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    adapters = model.peft_config.values() if isinstance(model, PeftModel) else ()
    saves_gate = any(set(GATE_MODULES) <= set(config.modules_to_save or ()) for config in adapters)
    if saves_gate and not has_residual_gate(base):
        raise ValueError(
            "the adapter has a residual gate and its base model has none, so the gate is lost; load the base model "
            "with thinking_residual_enabled=True before the adapter."
        )
    if args.mode not in RESIDUAL_MODES:
        if has_residual_gate(base):
            raise ValueError(
                f"the model has a residual gate (thinking_residual_enabled) and mode={args.mode!r} does not train it; "
                "set mode='hrpo' or 'h3po'."
            )
        return peft_config
    check_model_type(base, args.mode)
    plugin = args.deepspeed_plugin
    if plugin is not None and "optimizer" in plugin.deepspeed_config:
        raise ValueError(
            f"the DeepSpeed configuration has an optimizer, which knows nothing of the learning rates of mode="
            f"{args.mode!r}; leave it out and set optim."
        )
    if adapters and not saves_gate:
        raise ValueError(
            f"the adapter was trained without a residual gate, which mode={args.mode!r} needs; merge it into its base "
            "model and start from that."
        )
    if has_residual_gate(base):
        for name in GATE_START:  # what is said of the run is what its gate began with
            setattr(args, name, getattr(base.config, name))
    else:
        attach_residual_gate(base, args.thinking_residual_r_min, args.thinking_residual_r_max, args.seed)
    return None if peft_config is None else _with_gate(peft_config)


def _with_gate(given: PeftConfig) -> PeftConfig:
    config = copy.deepcopy(given)
    config.modules_to_save = sorted({*(config.modules_to_save or ()), *GATE_MODULES})
    return config


def prepare_reference(policy: Any, reference: Any, args: Any) -> None:
    """Gives the reference model, loaded without a gate or with any, the gate that the policy starts with."""
    if not has_residual_gate(reference):
        attach_residual_gate(reference, args.thinking_residual_r_min, args.thinking_residual_r_max, args.seed)
    copy_residual_gate(policy, reference)


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
