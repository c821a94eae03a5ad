# SPDX-License-Identifier: Apache-2.0
"""The learnable gating function of a model: `model.base_model.m3po_gating`, made, started and looked up.

A gating function with parameters is a module of the base model, so that it is trained, saved, loaded and handed to a
reference model as every other; gating functions without parameters are made where they are used. Like all modules of
this overlay it is float32 whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..flags import has_gating
from .factory import check_gating_fields, create_gating_function, gating_class

GATING_MODULE = "m3po_gating"


def add_gating(model: Any) -> None:
    """Makes the gating function on a base model if its configuration has one."""
    config = model.config
    if not has_gating(model):
        return
    sizes = {"vocab_size": config.vocab_size, "hidden_size": config.hidden_size}
    gating = create_gating_function(config.m3po_gating_type, {**(config.m3po_gating_config or {}), **sizes})
    setattr(model, GATING_MODULE, gating)


def attach_gating(model: Any, gating_type: str, gating_config: Mapping[str, Any] | None = None, seed: int = 0) -> None:
    """Gives a plain model a gating function in its start (in place), the same one for the same seed.

    Args:
        model: a Llama or Qwen2 model, with or without its head; its configuration is changed too.
        gating_type: `luong`, `bahdanau` or a learnable gating function that was registered.
        gating_config: the options that say its size; others, as a temperature, are not the model's and not kept.
        seed: of the start; torch's own generator is left alone.

    Raises:
        ValueError: the gating function is unknown, has no parameters, or an option is wrong.
    """
    base = model.base_model
    check_gating_fields(gating_type, gating_config)
    for config in {id(net.config): net.config for net in (model, base)}.values():
        config.m3po_gating_enabled = True
        config.m3po_gating_type = gating_type
        config.m3po_gating_config = gating_class(gating_type).structure(gating_config)
    with torch.random.fork_rng(devices=[]):  # a gating function draws a start of its own, which is replaced
        add_gating(base)
    gating = getattr(base, GATING_MODULE)
    gating.start(torch.Generator().manual_seed(seed), base.embed_tokens)
    gating.to(base.embed_tokens.weight.device)


def gating_parameter_names(hyperparameters: Mapping[str, Any]) -> tuple[str, ...]:
    """The parameters and buffers of a checkpoint with these hyperparameters, by their names on the base model."""
    if "gating_type" not in hyperparameters:
        return ()
    gating = gating_class(hyperparameters["gating_type"])
    projects = gating.structure(hyperparameters.get("gating_config")).get("project_embeddings", False)
    names = (*gating.parameter_names, *(("whitening", "token_scale") if projects else ()))
    return tuple(f"{GATING_MODULE}.{name}" for name in names)


def gating_of_model(model: Any, gating_type: str, gating_config: Mapping[str, Any] | None = None) -> Any:
    """The gating function of a model that a rollout names.

    Raises:
        ValueError: the model has none, another one, or one of another size than `gating_config` says.
    """
    present = getattr(model.config, "m3po_gating_type", None) if has_gating(model) else None
    if present != gating_type:
        raise ValueError(
            f"gating_type={gating_type!r} learns, and the model has "
            f"{repr(present) if present else 'no such gating function'}: a fresh one comes with attach_gating(model, "
            f"{gating_type!r}) or with training; or set gating_type={present or 'baseline'!r}."
        )
    has = gating_class(gating_type).structure(model.config.m3po_gating_config)
    for name, value in has.items():
        if (gating_config or {}).get(name, value) != value:
            raise ValueError(
                f"gating_config {name}={(gating_config or {})[name]!r}, and the gating function of the model has "
                f"{value!r}; leave it out."
            )
    return getattr(model.base_model, GATING_MODULE)
