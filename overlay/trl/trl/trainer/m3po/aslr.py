# SPDX-License-Identifier: Apache-2.0
"""What training does to the modules of ASLR, in numbers; one reading per optimizer step."""

from __future__ import annotations

from typing import Any

import torch
from transformers.m3po.aslr.modules import ASLR_MODULES


def latent_parameters(model: Any) -> dict[str, torch.Tensor]:
    """The parameters of the modules that are trained, by name; of an adapter's copies the trained one."""
    return {
        name: value
        for name, value in model.named_parameters()
        if value.requires_grad and any(part in ASLR_MODULES for part in name.split("."))
    }


@torch.no_grad()
def latent_statistics(
    model: Any, scale: float, start: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Numbers of the modules as they are, with their gradients before clipping; 0-dim float32 tensors on the device.

    Args:
        model: the policy, with or without an adapter (of its copies of the modules, the trained one is looked at).
        scale: what the loss was multiplied with before the backward pass.
        start: the parameters that the run started with, by name.

    Returns:
        router_distance, path_collaborator_distance, path_aggregator_distance: L2 norm of what the parameters of a
        module have moved by since the start, before the optimizer step; left out where the processes share them.
        aggregator_weight_entropy: entropy of the path aggregator's softmax weights, in nats; log P when all paths weigh
        the same. router_grad_norm, path_collaborator_grad_norm, path_aggregator_grad_norm: L2 norms of the modules'
        gradients; left out where an engine does not keep them in `.grad` (ZeRO-3).
    """
    trained: dict[str, list[torch.Tensor]] = {name: [] for name in ASLR_MODULES}
    moved: dict[str, list[torch.Tensor]] = {name: [] for name in ASLR_MODULES}
    shares = None
    for name, parameter in latent_parameters(model).items():
        owner = next(part for part in name.split(".") if part in ASLR_MODULES)
        if start and name in start and start[name].shape == parameter.shape and not hasattr(parameter, "full_tensor"):
            moved[owner].append((parameter.float() - start[name].to(parameter.device)).norm())
        if parameter.grad is not None:
            trained[owner].append(_whole(parameter.grad))
        if owner == "m3po_path_aggregator" and parameter.dim() == 1 and "weight_proj" not in name:
            shares = _whole(parameter).float().softmax(-1)
    statistics = {} if shares is None else {"aggregator_weight_entropy": torch.special.entr(shares).sum()}
    for name, distances in moved.items():
        if distances:
            statistics[f"{name.removeprefix('m3po_')}_distance"] = torch.stack(distances).norm()
    for name, gradients in trained.items():
        if gradients:
            norms = torch.stack([gradient.float().norm() for gradient in gradients])
            statistics[f"{name.removeprefix('m3po_')}_grad_norm"] = norms.norm() / scale
    return statistics


def _whole(value: torch.Tensor) -> torch.Tensor:
    """A parameter or gradient, put together from its parts where the processes share it (FSDP2)."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
