# SPDX-License-Identifier: Apache-2.0
"""What a controller sets: one routing gate, one for each layer, or one for each sublayer, as numbers in [0, 1]."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

KINDS = ("global", "layer", "sublayer")


@dataclass(frozen=True)
class GateSpace:
    """The gates of a model.

    Args:
        kind: one of `KINDS`.
        layers: L, those of the model.
    """

    kind: str
    layers: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"gates={self.kind!r} is unknown; give one of {', '.join(KINDS)}.")

    @property
    def size(self) -> int:
        """d, how many numbers a controller sets."""
        return {"global": 1, "layer": self.layers, "sublayer": 2 * self.layers}[self.kind]

    def as_routing_gates(self, values: np.ndarray) -> torch.Tensor:
        """The argument `mhc_gate` of a forward for rows with these values.

        Args:
            values: (B, d) in [0, 1].

        Returns:
            (B, 1, 1), (B, L, 1) or (B, L, 2) float32; of a sublayer attention comes before MLP.
        """
        gates = torch.as_tensor(np.asarray(values), dtype=torch.float32).reshape(len(values), -1)
        return gates.reshape(len(gates), 1 if self.kind == "global" else self.layers, -1)


def from_actions(actions: np.ndarray) -> np.ndarray:
    """Values in [0, 1] of actions in [-1, 1]; what lies outside is cut."""
    return (np.clip(actions, -1.0, 1.0) + 1.0) / 2.0


def to_actions(values: np.ndarray) -> np.ndarray:
    """The inverse."""
    return 2.0 * np.asarray(values, dtype=np.float32) - 1.0
