# SPDX-License-Identifier: Apache-2.0
"""The modules of this overlay in training: made before the adapter is laid on, trained and saved with it.

HRPO's residual gate goes with the modes `hrpo` and `h3po`, ASLR with `aslr_enabled` in any mode, a learnable gating
function with `gating_type` in the modes in which paths interact.
"""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftConfig, PeftModel
from transformers.m3po.aslr.settings import ASLR_HYPERPARAMETERS, ASLRHyperparameters
from transformers.m3po.flags import check_aslr_overrides
from transformers.m3po.gating.factory import gating_class
from transformers.m3po.modules import ADDED_MODULES, ASLR, GATING, RESIDUAL_GATE, AddedModules
from transformers.m3po.settings import RESIDUAL_MODES

from .checks import check_model_type
from .config import RESIDUAL_GATE_START


def wanted_modules(args: Any) -> list[AddedModules]:
    """What a run with these arguments trains; `aslr_enabled` is settled by `prepare_policy`."""
    return [modules for modules in ADDED_MODULES if modules.belongs(vars(args))]


def prepare_policy(model: Any, args: Any, peft_config: PeftConfig | None) -> PeftConfig | None:
    """Hook of `GRPOTrainer.__init__`, before the adapter: gives the model the modules that the run trains.

    Args:
        model: the policy. A plain one gets fresh modules (in place): a residual gate and a learnable gating function
            that depend on `args.seed` alone, so that a resumed run has the same start; those of ASLR start alike
            everywhere.
        args: the `GRPOConfig`. What it leaves open of ASLR becomes the model's, and what the two say of a residual
            gate's start becomes the model's too: what is said of the run is what it trains.
        peft_config: the adapter that will be laid on, if any.

    Returns:
        The adapter's configuration; with modules to train, a copy that trains and saves them whole (PEFT lays no LoRA
        on what it saves whole).

    Raises:
        ValueError: the model and the arguments contradict each other, or DeepSpeed brings an optimizer of its own.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    adapters = list(model.peft_config.values()) if isinstance(model, PeftModel) else []
    saved = {name for config in adapters for name in config.modules_to_save or ()}
    for modules in ADDED_MODULES:
        if set(modules.names) <= saved and not modules.on(base):
            raise ValueError(
                f"the adapter has {modules.article} and its base model has none, so the {modules.noun} is lost; load "
                f"the base model with {modules.switch}=True before the adapter."
            )
    _prepare_aslr(base, args)
    if args.mode not in RESIDUAL_MODES and RESIDUAL_GATE.on(base):
        raise ValueError(
            f"the model has a residual gate (thinking_residual_enabled) and mode={args.mode!r} does not train it; "
            "set mode='hrpo' or 'h3po'."
        )
    wanted = wanted_modules(args)
    if GATING.on(base):
        _check_gating(base, args, GATING in wanted)
    if not wanted:
        return peft_config
    why = {
        RESIDUAL_GATE: f"mode={args.mode!r}",
        ASLR: "aslr_enabled=True",
        GATING: f"gating_type={args.gating_type!r}",
    }
    check_model_type(base, why[wanted[0]])
    for modules in (RESIDUAL_GATE, GATING):
        if modules in wanted:
            _check_optimizer(args, why[modules])
    for modules in wanted:
        if adapters and not set(modules.names) <= saved:
            raise ValueError(
                f"the adapter was trained without {modules.article}, which {why[modules]} needs; merge it into its "
                "base model and start from that."
            )
        if not modules.on(base):
            modules.attach(base, vars(args), args.seed)
    if RESIDUAL_GATE in wanted:
        for name in RESIDUAL_GATE_START:
            setattr(args, name, getattr(base.config, name))
    return None if peft_config is None else _with_modules(peft_config, wanted)


def _prepare_aslr(base: Any, args: Any) -> None:
    """Makes the arguments and the model's configuration say the same of ASLR; what is unset is taken from the model."""
    requested = {name: getattr(args, name) for name in ASLR_HYPERPARAMETERS if getattr(args, name) is not None}
    if args.aslr_enabled is None:
        args.aslr_enabled = ASLR.on(base)
    if not args.aslr_enabled:
        if ASLR.on(base):
            raise ValueError(
                "aslr_enabled=False, and the model has ASLR (aslr_enabled in its config): leave the flag out, or start "
                "from the model without it (make export-model ... ASLR=off, or from_pretrained(..., aslr_enabled="
                "False))."
            )
        if requested:
            raise ValueError(
                f"{next(iter(requested))} does nothing without ASLR: set aslr_enabled=True, or leave it out."
            )
        return
    check_model_type(base, "aslr_enabled=True")
    if ASLR.on(base):
        check_aslr_overrides(base, requested)
        for name, value in requested.items():
            setattr(base.config, name, value)
    for name in ASLR_HYPERPARAMETERS:
        if getattr(args, name) is None:
            setattr(args, name, getattr(base.config, name))


def _check_gating(base: Any, args: Any, wanted: bool) -> None:
    """Refuses a run that would leave the gating function of its model alone, or that asks for another one."""
    has = base.config.m3po_gating_type
    structure = gating_class(has).structure(base.config.m3po_gating_config)
    if not wanted or args.gating_type != has:
        raise ValueError(
            f"the model has the learnable gating function {has!r} (m3po_gating_enabled), and mode={args.mode!r} with "
            f"gating_type={args.gating_type!r} does not train it; set gating_type={has!r} in mode 'm3po' or 'h3po', or "
            "load the model with m3po_gating_enabled=False."
        )
    for name, value in structure.items():
        if args.gating_config[name] != value:
            raise ValueError(
                f"gating_config {name}={args.gating_config[name]!r}, and the gating function of the model has "
                f"{value!r}; set that, or load the model with m3po_gating_enabled=False for a fresh gating function."
            )


def _check_optimizer(args: Any, why: str) -> None:
    plugin = args.deepspeed_plugin
    if plugin is not None and "optimizer" in plugin.deepspeed_config:
        raise ValueError(
            f"the DeepSpeed configuration has an optimizer, which knows nothing of the learning rates of {why}; leave "
            "it out and set optim."
        )


def _with_modules(requested: PeftConfig, wanted: list[AddedModules]) -> PeftConfig:
    config = copy.deepcopy(requested)
    names = [name for modules in wanted for name in modules.names]
    config.modules_to_save = sorted({*(config.modules_to_save or ()), *names})
    return config


def prepare_modules(model: Any, args: Any) -> None:
    """Makes the modules of the policy what they must be when the optimizer is made, in place.

    They are float32, whatever has cast the model since (TRL casts all that is trainable on quantised base weights); and
    where the loop of ASLR is skipped, or no path listens (λ = 0), the modules are not among what DDP and the optimizer
    take, since no gradient would reach them and DDP would wait for it.
    """
    for modules in wanted_modules(args):
        trains = modules is RESIDUAL_GATE or (
            ASLRHyperparameters.of(args, {}).runs if modules is ASLR else args.cross_path_lambda > 0
        )
        named = dict(model.named_parameters())
        for name in modules.among(named):
            named[name].data = named[name].data.float()
            named[name].requires_grad_(named[name].requires_grad and trains)


def prepare_reference(policy: Any, reference: Any, args: Any) -> None:
    """Gives the reference model, loaded with such modules or without, those that the policy starts with, and no other.

    TRL loads it by the policy's name, so it may have modules that the policy was loaded without.
    """
    for modules in ADDED_MODULES:
        if modules not in wanted_modules(args):
            if modules.on(reference):
                setattr(reference.config, modules.switch, False)
            continue
        if not modules.on(reference):
            modules.attach(reference, vars(args), args.seed)
        modules.copy(policy, reference)
    if ASLR in wanted_modules(args):
        for name in ASLR_HYPERPARAMETERS:
            setattr(reference.config, name, getattr(args, name))
