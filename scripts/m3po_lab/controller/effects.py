# SPDX-License-Identifier: Apache-2.0
"""Before a controller is trained: whether the gate does anything, and what one is worth that is the same everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers.m3po.hyper_connections.report import NO_EFFECT

from m3po_lab.controller.controls import grid_of
from m3po_lab.controller.episodes import Episodes
from m3po_lab.core.errors import UserError

PROBLEMS = 256  # of the pre-flight
LAYER_GATES = (0.0, 0.25, 0.5, 0.75)  # tried in one layer while the others have 1


def preflight(episodes: Episodes) -> float:
    """KL divergence in nats between gates 0 and 1, mean over the positions of questions and answers.

    Raises:
        UserError: it is so small that a controller would tune nothing.
    """
    effect = float(episodes.divergences(np.arange(min(PROBLEMS, len(episodes.problems))), 0.0).mean())
    if effect < NO_EFFECT:
        raise UserError(
            f"The routing gate does nothing here: {effect:.1e} nats between gates 0 and 1, below {NO_EFFECT:.0e}, so a "
            "controller would tune nothing. Train the model longer, with --mhc_diagonal_bias 2 and --mhc_gate_noise "
            "0.5, as configs/mhc_arithmetic.yaml does."
        )
    return effect


def grid_effects(episodes: Episodes, number: int) -> list[dict[str, Any]]:
    """What each gate of a grid, the same in all layers, is worth on every problem.

    Returns:
        gate, divergence: the mean KL divergence in nats from gate 1; and see `worth`.
    """
    problems, found = np.arange(len(episodes.problems)), []
    for gate in tqdm(grid_of(number), desc="gates in all layers"):
        apart = float(episodes.divergences(problems, gate).mean())
        found.append({"gate": float(gate), "divergence": apart, **worth(episodes, np.full(episodes.space.size, gate))})
    return found


def layer_effects(episodes: Episodes) -> list[dict[str, Any]]:
    """The same of one layer's gate, the others having 1: `layer`, `gate`, and see `worth`.

    Args:
        episodes: with a gate for each layer.
    """
    found = []
    for layer, gate in tqdm([*product(range(episodes.space.size), LAYER_GATES)], desc="gates in one layer"):
        values = np.ones(episodes.space.size)
        values[layer] = gate
        found.append({"layer": layer, "gate": gate, **worth(episodes, values)})
    return found


def worth(episodes: Episodes, values: np.ndarray) -> dict[str, Any]:
    """What gates are worth on every problem of a split.

    Args:
        episodes: of the split.
        values: (d,) for all problems, or (n, d).

    Returns:
        dense: (n) log-prob of the reference minus that under gate 1, nats a token.
        correct: (n) whether the greedy answer is right.
    """
    problems = np.arange(len(episodes.problems))
    each = np.broadcast_to(values, (len(problems), episodes.space.size))
    return {
        "dense": (episodes.log_probs(problems, each) - episodes.default_log_probs).tolist(),
        "correct": episodes.correct(problems, each).tolist(),
    }


def accuracy(found: dict[str, Any] | Sequence[bool]) -> float:
    """The share of right answers in what `worth` found."""
    return float(np.mean(found["correct"] if isinstance(found, dict) else found))
