# SPDX-License-Identifier: Apache-2.0
"""What every gating function is: a similarity of distributions with a temperature, and a masked softmax."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

TINY = torch.finfo(torch.float32).tiny
# Options that every gating function takes; `GenerationConfig` and `GRPOConfig` carry them in `gating_config`.
COMMON_OPTIONS = ("temperature", "debug")


class BaseM3POGating(nn.Module, ABC):
    """A gating function. A new one is a subclass with `default_temperature` and `compute_similarity_matrix`.

    Args:
        config: options of the gating function, `temperature` and `debug` (which the rollout reads) among them.

    Attributes:
        temperature: T of eq. 5, above 0: the option, else the class's `default_temperature`.
        given_temperature: the option; None where it was not given.
        debug: whether every step is logged.

    Raises:
        ValueError: an option that the gating function does not have, or a temperature that is not above 0.
    """

    default_temperature: ClassVar[float]
    options: ClassVar[tuple[str, ...]] = ()
    learnable: ClassVar[bool] = False  # has parameters, see `learnable_gates`
    other_group: ClassVar[bool] = False  # its weights go to the paths of another group, see `placebos`
    parameter_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Mapping[str, Any] | None = None):
        super().__init__()
        chosen = dict(config or {})
        unknown = sorted(set(chosen) - set(self.known_options()))
        if unknown:
            raise ValueError(
                f"gating_config has no option {', '.join(map(repr, unknown))} for {type(self).__name__}; it takes "
                f"{', '.join(self.known_options())}."
            )
        temperature = chosen.get("temperature")
        self.temperature = float(self.default_temperature if temperature is None else temperature)
        self.given_temperature = None if temperature is None else self.temperature
        self.debug = bool(chosen.get("debug", False))
        self._given = chosen
        if not self.temperature > 0.0:
            raise ValueError(
                f"temperature={self.temperature} is not above 0; the default of {type(self).__name__} is "
                f"{self.default_temperature}."
            )

    def describe(self) -> str:
        """The class and the options that were given."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._given.items())})"

    @classmethod
    def known_options(cls) -> tuple[str, ...]:
        """The names that `config` may have."""
        return (*COMMON_OPTIONS, *cls.options)

    @classmethod
    def structure(cls, config: Mapping[str, Any] | None) -> dict[str, Any]:
        """The options that say what parameters a gating function has, defaults filled in."""
        return {}

    @abstractmethod
    def compute_similarity_matrix(self, probs: torch.Tensor) -> torch.Tensor:
        """S of every pair of paths: probs (..., N, V) float32 -> (..., N, N) float32, larger for more alike.

        No entry may be NaN or infinite, forward or backward, for any distributions. The diagonal is not read.
        """

    def forward(self, probs: torch.Tensor) -> torch.Tensor:
        """The similarity in float32 whatever comes in, so that it can stand where a plain function is expected."""
        with torch.autocast(probs.device.type, enabled=False):
            return self.compute_similarity_matrix(probs.float())

    def compute_attention_weights(self, similarity: torch.Tensor, active_mask: torch.Tensor) -> torch.Tensor:
        """A of eq. 5 at its temperature: (..., N, N), (..., N) bool -> (..., N, N), see `attention_weights`."""
        return attention_weights(similarity, active_mask, self.temperature)[0]

    def statistics(self) -> dict[str, torch.Tensor]:
        """Statistics of its own, beyond those that all gating functions share; 0-dim tensors by name."""
        return {}


class Attention(NamedTuple):
    """Who listens to whom in each group.

    Attributes:
        weights: (..., N, N), A of eq. 5: zero on the diagonal, at paths that do not take part and at padding; every row
            of an active path with an active peer sums to 1, every other row is zero. Finite forward and backward.
        similarity: (..., N, N), S of eq. 3, before any mask.
        pairs: (..., N, N) bool, the pairs that may exchange.
        temperature: T, one number or, matched, (..., 1, 1).
    """

    weights: torch.Tensor
    similarity: torch.Tensor
    pairs: torch.Tensor
    temperature: float | torch.Tensor


def attention_weights(
    similarity: torch.Tensor, active_mask: torch.Tensor, temperature: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked softmax of S / T over the active peers of each path.

    Args:
        similarity: (..., N, N) float32.
        active_mask: (..., N) bool, the paths that take part.
        temperature: T, above 0; a tensor is spread over the similarity.

    Returns:
        weights (..., N, N) float32: zero on the diagonal and at paths that do not take part; every row of an active
        path with an active peer sums to 1, every other row is zero. Finite forward and backward.
        pairs (..., N, N) bool: the pairs that may exchange.
    """
    pairs = active_mask[..., :, None] & active_mask[..., None, :]
    pairs = pairs & ~torch.eye(active_mask.shape[-1], dtype=torch.bool, device=pairs.device)
    # A finite fill and a mask behind the softmax: a row without a peer is zero, its gradient is zero and not NaN.
    scores = (similarity / temperature).masked_fill(~pairs, torch.finfo(torch.float32).min)
    return scores.softmax(-1) * pairs, pairs
