# SPDX-License-Identifier: Apache-2.0
"""ASLR in a rollout: the seeds of the rows, the overrides of a call, and what the latent paths did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..flags import has_aslr
from .modules import MAX_SEED, check_row_seeds, runs_aslr
from .settings import ASLRHyperparameters

if TYPE_CHECKING:
    from ...generation import GenerationConfig

# What `aslr_trace` holds of a position, see `refine_states`.
TRACE_WIDTH = 3


class LatentRollout:
    """Allocates the trace for B rows and `max_new_tokens` positions once; the model writes one position a step.

    Args:
        model: the model that generates, with ASLR.
        rows: B.
        max_new_tokens: T at most.
        device: of the rollout.
        row_seeds: (B,) integers; None draws them from torch's generator.
        overrides: flag: value, of the call, checked by `check_generation_mode`.

    Attributes:
        row_seeds: (B,) long, on the device; zeros where there is no noise to make.
        trace: (B, T, 3) float32: router score, spread of the latent paths after expansion and after the last round, at
            the state that each completion token was sampled from.

    Raises:
        ValueError: there is not one seed for each row, or they are no integers.
    """

    def __init__(
        self,
        model: Any,
        rows: int,
        max_new_tokens: int,
        device: torch.device,
        row_seeds: torch.Tensor | None,
        overrides: Mapping[str, Any],
    ):
        self._overrides = dict(overrides)
        self._hyperparameters = ASLRHyperparameters.of(model.config, overrides)
        if row_seeds is not None:
            check_row_seeds(row_seeds, rows)
            self.row_seeds = row_seeds.to(device).long()
        elif self._hyperparameters.runs and self._hyperparameters.gumbel_temp > 0:
            self.row_seeds = torch.randint(MAX_SEED, (rows,), device=device)
        else:  # without noise nothing is drawn, so that torch's generator is left where plain decoding leaves it
            self.row_seeds = torch.zeros(rows, dtype=torch.long, device=device)
        self.trace = torch.zeros(rows, max_new_tokens, TRACE_WIDTH, device=device)
        self._sampled = torch.zeros(rows, max_new_tokens, dtype=torch.bool, device=device)

    @classmethod
    def of(
        cls,
        model: Any,
        input_ids: torch.Tensor,
        generation_config: GenerationConfig,
        max_new_tokens: int,
        row_seeds: torch.Tensor | None,
        overrides: Mapping[str, Any],
    ) -> LatentRollout | None:
        """The ASLR side of a rollout of `input_ids` (B, L); None on a model without ASLR and at inference."""
        if not has_aslr(model) or not runs_aslr(generation_config.is_m3po_inference):
            return None
        return cls(model, len(input_ids), max_new_tokens, input_ids.device, row_seeds, overrides)

    @property
    def buffers(self) -> list[torch.Tensor]:
        """What is kept for the statistics."""
        return [self.trace, self._sampled]

    @property
    def forward_kwargs(self) -> dict[str, Any]:
        """What the model's forward gets in every pass, the trace being that of the first token (`trace_of`)."""
        return {
            **self._overrides,
            "is_m3po_inference": False,
            "aslr_row_seeds": self.row_seeds,
            "aslr_trace": self.trace_of(0),
        }

    def trace_of(self, step: int) -> torch.Tensor:
        """The part of the trace (B, 1, 3) that is written when completion token `step` is predicted."""
        return self.trace[:, step : step + 1]

    def write(self, step: int, was_unfinished: torch.Tensor) -> None:
        """Notes the rows (B,) bool whose token `step` was sampled, not padded."""
        self._sampled[:, step] = was_unfinished

    def end(self, steps: int) -> dict[str, torch.Tensor]:
        """Cuts the trace to `steps` positions; means over the sampled tokens, 0-dim float32 tensors on the device.

        Returns:
            router_weight_mean: the router's score g. activation_rate_actual: share of the positions with g above the
            threshold. latent_diversity_before, latent_diversity_after: `path_spread` of the latent paths after
            expansion and after the last round. {} when the loop is skipped (P = 1 or R = 0).
        """
        self.trace, self._sampled = self.trace[:, :steps], self._sampled[:, :steps]
        if not self._hyperparameters.runs:
            return {}
        score, before, after = self.trace.unbind(-1)
        means = {
            "router_weight_mean": score,
            "activation_rate_actual": (score > self._hyperparameters.threshold).float(),
            "latent_diversity_before": before,
            "latent_diversity_after": after,
        }
        count = self._sampled.sum()
        return {name: torch.where(self._sampled, value, 0.0).sum() / count for name, value in means.items()}
