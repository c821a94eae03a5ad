# SPDX-License-Identifier: Apache-2.0
"""What paths and latent paths do, as lines of the log, while debugging is on: `M3PO_DEBUG=1`, or `debug` of a gating
function.

Every line reads numbers back from the device, so nothing here is called while debugging is off.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from ..utils import logging

if TYPE_CHECKING:
    from .gating.base import Attention

logger = logging.get_logger(__name__)

# Largest group whose matrices are logged; of larger ones there are the statistics.
MATRIX_GROUP_SIZE = 8


def debugging() -> bool:
    """Whether the environment asks for debugging."""
    return os.environ.get("M3PO_DEBUG") == "1"


def log_attention(
    where: str, attention: Attention, active: torch.Tensor, cross_path_lambda: float | None, gating: str
) -> None:
    """Logs who listened to whom: numbers of the interaction, means over the paths that listened, small matrices.

    Args:
        where: what the line begins with, e.g. the step.
        attention: of one step.
        active: (..., N) bool, the paths that took part.
        cross_path_lambda: λ; None where only the weights are asked for.
        gating: the gating function and its options.
    """
    weights, pairs = attention.weights, attention.pairs
    listens = (weights > 0).any(-1)
    peers = pairs.sum(-1)[listens]
    heard = weights[listens]
    temperature = torch.as_tensor(attention.temperature).flatten().tolist()
    line = (
        f"M3PO {where}: {int(active.sum())} active paths in {active[..., 0].numel()} groups, "
        f"lambda={cross_path_lambda}, temperature={', '.join(f'{value:.4g}' for value in temperature)}, "
        f"gating_function={gating}"
    )
    if len(heard) == 0:
        logger.warning(f"{line}; no path has an active peer")
        return
    similarity = attention.similarity[pairs]
    variance = (heard.square().sum(-1) / peers - 1.0 / peers.square()).clamp_min(0.0)
    line += (
        f"; attention: entropy {float(torch.special.entr(heard).sum(-1).mean()):.4f} nats, largest weight "
        f"{float(heard.amax(-1).mean()):.4f}, variance {float(variance.mean()):.4g}; similarity "
        f"{float(similarity.amin()):.4g} to {float(similarity.amax()):.4g}"
    )
    if weights.shape[-1] <= MATRIX_GROUP_SIZE:
        line += f"\nsimilarity\n{attention.similarity}\nweights\n{weights}"
    logger.warning(line)


def log_thoughts(where: str, active: torch.Tensor, probs: torch.Tensor | None, why: str) -> None:
    """Logs a step at which no path listens to another.

    Args:
        where: what the line begins with.
        active: (B,) bool, the paths that think.
        probs: (B, K) float32, the kept probabilities of their soft thoughts; None in mode m3po.
        why: why they do not listen.
    """
    line = f"M3PO {where}: {int(active.sum())} of {len(active)} paths think, none listens to another ({why})"
    if probs is not None and bool(active.any()):
        entries = probs[active].float()
        line += (
            f"; soft thoughts: {entries.shape[-1]} entries, largest probability {float(entries.amax(-1).mean()):.4f}, "
            f"probability kept {float(entries.sum(-1).mean()):.4f}"
        )
    logger.warning(line)


def log_latent_paths(hyperparameters: Any, score: torch.Tensor, spreads: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Logs what ASLR did in a forward.

    Args:
        hyperparameters: `ASLRHyperparameters` of the call.
        score: (B, L) float32, the router's.
        spreads: (B, L) float32 each, how far the latent paths lie apart after expansion and after the last round.
    """
    before, after = (float(spread.mean()) for spread in spreads)
    logger.warning(
        f"ASLR: the router activates {int((score > hyperparameters.threshold).sum())} of {score.numel()} positions "
        f"(score {float(score.amin()):.4f} to {float(score.amax()):.4f}), {hyperparameters.max_iterations} rounds of "
        f"{hyperparameters.num_paths} latent paths, which lie {before:.4g} apart before and {after:.4g} after them; "
        f"{hyperparameters.describe()}"
    )
