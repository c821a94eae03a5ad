# SPDX-License-Identifier: Apache-2.0
"""A learnable gating function in training: whole groups in a micro-batch, blended scores, statistics, warm-up."""

from __future__ import annotations

from functools import partial
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
from transformers.m3po.gating.module import GATING_MODULE
from transformers.m3po.modules import GATING
from transformers.m3po.settings import ThinkingSettings
from transformers.m3po.thinking.logits import apply_m3po_to_logits
from transformers.m3po.thinking.record import RolloutRecord

Batch = dict[str, Any]


def as_groups(batch: Batch, num_generations: int) -> Batch:
    """The batch with one entry a group instead of one a row, so that TRL's shuffle keeps groups together.

    Args:
        batch: tensors and lists of B rows, the N = `num_generations` rows of a group side by side; 0-dim tensors and
            None are left alone.
    """

    def by_group(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.unflatten(0, (-1, num_generations)) if value.dim() else value
        if value is None:
            return None
        return [value[start : start + num_generations] for start in range(0, len(value), num_generations)]

    return {name: by_group(value) for name, value in batch.items()}


def as_rows(batch: Batch) -> Batch:
    """The inverse of `as_groups`."""

    def by_row(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.flatten(0, 1) if value.dim() else value
        return None if value is None else [*chain.from_iterable(value)]

    return {name: by_row(value) for name, value in batch.items()}


def blended_scores(
    model: Any,
    base_model: Any,
    model_inputs: Batch,
    labels: torch.Tensor,
    record: RolloutRecord,
    settings: ThinkingSettings,
    temperature: float,
) -> SimpleNamespace:
    """What TRL's fused head returns, from output distributions that the group has blended (`gating_training: logits`).

    Args:
        model: the policy or reference as it is called.
        base_model: the base model in it, for its gating function and its embeddings.
        model_inputs: of the forward, without bags.
        labels: (B, L) long, -100 where nothing is scored.
        record: of the rows, C positions; its thinking mask and groups are read.
        settings: of the mode.
        temperature: the sampling temperature.

    Returns:
        log_probs and entropy, (B, C) float32, 0 where nothing is scored.
    """
    if record.thinking_mask is None or record.group_ids is None:
        raise ValueError("the rollout recorded no thinking mask or no groups, which gating_training='logits' reads.")
    length = record.thinking_mask.shape[1]
    logits = model(**model_inputs, logits_to_keep=length + 1, use_cache=False).logits[:, :-1].float() / temperature
    gating_function = partial(getattr(base_model, GATING_MODULE), embed_tokens=base_model.embed_tokens)
    blend = record.thinking_mask, gating_function, settings.cross_path_lambda, settings.temperature
    log_probs = apply_m3po_to_logits(logits, record.group_ids, *blend)
    targets = labels[:, -length:]
    scored = targets != -100
    chosen = log_probs.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return SimpleNamespace(log_probs=chosen * scored, entropy=entropy * scored, aux_loss=None)


def trained_gating_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """The trained parameters of a model's gating function by name; of an adapter's copies, the trained one."""
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return {name: named[name] for name in GATING.among(named)}


@torch.no_grad()
def gating_statistics(model: Any, start: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """Numbers of the gating function before an optimizer step, with its gradients before clipping; 0-dim float32
    tensors.

    Args:
        model: the policy.
        start: the parameters that the run started with, by name.
        scale: what the loss was multiplied with before the backward pass.

    Returns:
        gating_grad_norm: L2 norm of the gradients. gating_distance: L2 norm of what the parameters have moved by, over
        that of the start.
    """
    parameters = trained_gating_parameters(model)
    gradients = [value.grad.float().norm() for value in parameters.values() if value.grad is not None]
    moved = torch.stack([(value - start[name]).norm() for name, value in parameters.items()]).norm()
    size = torch.stack([start[name].norm() for name in parameters]).norm()
    statistics = {"gating_distance": moved / size}
    return statistics | ({"gating_grad_norm": torch.stack(gradients).norm() / scale} if gradients else {})


def zero_other_gradients(model: Any) -> None:
    """Takes the gradients of all other parameters, so that an optimizer step moves the gating function alone."""
    gating = trained_gating_parameters(model)
    for name, value in model.named_parameters():
        if name not in gating:
            value.grad = None
