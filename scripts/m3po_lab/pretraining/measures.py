# SPDX-License-Identifier: Apache-2.0
"""What is measured of a pretraining: bits of the validation text, the routing matrices, and the memory."""

from __future__ import annotations

import resource
from typing import Any

import torch
from transformers import NanoChatForCausalLM
from transformers.m3po.flags import has_hyper_connections
from transformers.m3po.hyper_connections.report import mean_matrices

from m3po_lab.pretraining.data import UNSCORED


def nats_of_rows(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Nats of each row's scored tokens: logits (B, T, V) and labels (B, T) -> (B)."""
    if isinstance(logits, tuple):
        logits = logits[0]
    shifted, targets = logits[:, :-1].float(), labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        shifted.flatten(0, 1), targets.flatten(), ignore_index=UNSCORED, reduction="none"
    )
    return losses.view(targets.shape).sum(1)


def summary(report: dict[str, Any]) -> dict[str, float]:
    """A report on all sublayers in one number each: the largest error, the means of the others."""
    parts = list(report["sublayers"].values())
    largest = {name: max(part[name] for part in parts) for name in ("row_error", "column_error")}
    for name in ("from_start", "from_identity", "stream_cosine"):
        largest[name] = sum(part[name] for part in parts) / len(parts)
    return {
        **largest,
        "composite_gain": max(report["composite_gain_rows"], report["composite_gain_columns"]),
        "gate_effect": report["gate_effect"],
    }


def matrices_of(model: NanoChatForCausalLM, inputs: dict[str, torch.Tensor]) -> dict[str, list[list[float]]] | None:
    """`mean_matrices` for a file; None for the baseline."""
    if not has_hyper_connections(model):
        return None
    return {name: matrix.tolist() for name, matrix in mean_matrices(model, inputs).items()}


def peak_bytes() -> int:
    """Of this process: the most memory on the GPU, or in the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
