# SPDX-License-Identifier: Apache-2.0
"""Reads the `m3po_modules.bin` that training by the prototype wrote beside a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..flags import has_aslr
from .modules import ASLR_MODULES, ASLR_PARAMETERS

# What PEFT puts between a module's name and its parameters.
WRAPPER = "modules_to_save.default."
# The prototype's collaborator is an `nn.MultiheadAttention`.
RENAMED = {
    "m3po_path_collaborator.attention.in_proj_weight": "m3po_path_collaborator.in_proj.weight",
    "m3po_path_collaborator.attention.in_proj_bias": "m3po_path_collaborator.in_proj.bias",
    "m3po_path_collaborator.attention.out_proj.weight": "m3po_path_collaborator.out_proj.weight",
    "m3po_path_collaborator.attention.out_proj.bias": "m3po_path_collaborator.out_proj.bias",
}


@torch.no_grad()
def load_prototype_modules(model: Any, file: str | Path) -> None:
    """Makes the ASLR modules of a model those of a file of the prototype (in place), tensors only
    (`weights_only=True`).

    The prototype aggregates to W x and ours to s + (W - 1) x, so the unit matrix is taken off its `weight_proj.weight`.
    It is
    a start for a training and not the same function: the prototype refines the last position alone, with other noise,
    without a temperature, and its attention reads states that are not divided by their RMS, by which the
    aggregator's bias is multiplied here.

    Args:
        model: a Llama or Qwen2 model with ASLR.
        file: one dictionary of tensors, or one for each module; names may have any prefix before the module's.

    Raises:
        ValueError: the model has no ASLR, or a tensor is missing, unexpected or of another shape.
    """
    if not has_aslr(model):
        raise ValueError(f"{file} holds ASLR modules and the model has none; load it with aslr_enabled=True.")
    stored = torch.load(file, map_location="cpu", weights_only=True)
    tensors: dict[str, torch.Tensor] = {}
    for stored_name, tensor in _tensors(stored):
        if "original_module." in stored_name:  # PEFT's copy of what the training began with
            continue
        name = RENAMED.get(stored_name, stored_name)
        if name in tensors:
            raise ValueError(f"{file} has {name} twice; leave one copy of each module in it.")
        tensors[name] = tensor
    targets = {name: model.base_model.get_parameter(name) for name in ASLR_PARAMETERS}
    for name, target in targets.items():
        if name not in tensors:
            raise ValueError(f"{file} lacks {name}; it is not a whole m3po_modules.bin.")
        if tensors[name].shape != target.shape:
            raise ValueError(
                f"{file} has {name} of shape {tuple(tensors[name].shape)} and the model {tuple(target.shape)}; load "
                "the model with the aslr_num_paths and the hidden size of the file."
            )
    unexpected = sorted(tensors.keys() - targets.keys())
    if unexpected:
        raise ValueError(f"{file} has {unexpected[0]}, which no ASLR module has.")
    for name, target in targets.items():
        value = tensors[name].float()
        if name == "m3po_path_aggregator.weight_proj.weight":
            value = value - torch.eye(len(value))
        target.copy_(value)


def _tensors(stored: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of nested dictionaries, each under its module's name and what follows it."""
    for key, value in stored.items():
        name = prefix + key
        if isinstance(value, Mapping):
            yield from _tensors(value, f"{name}.")
            continue
        start = next((name.index(module) for module in ASLR_MODULES if module in name), 0)
        yield name[start:].replace(WRAPPER, ""), value


load_seed_modules = load_prototype_modules  # its name before
