# SPDX-License-Identifier: Apache-2.0
"""One cross-path rollout: who thinks, who listens to whom, and the record of it (M3PO paper, eq. 2-6; E1-E3, E6)."""

from __future__ import annotations

from typing import Any

import torch

from ..utils import logging
from .bags import bag_size, cross_path_bags
from .interaction import GATES, GatingFunction, PathGroups, path_attention
from .marker import AnswerMarker
from .settings import CrossPathSettings
from .statistics import SimilaritySums, attention_statistics

logger = logging.get_logger(__name__)

# Model types whose forward calls `mix_thinking_inputs` (the patches on LlamaModel and Qwen2Model).
SUPPORTED_MODEL_TYPES = ("llama", "qwen2")
# Largest group whose matrices are logged when debugging.
DEBUG_GROUP_SIZE = 8


class CrossPathRollout:
    """Allocates the record for B rows and `max_new_tokens` positions once, then fills one position a step.

    Args:
        settings: the numbers.
        group_ids: (B,) integers, on the device of the rollout.
        max_new_tokens: T at most.
        tokenizer: to find the answer marker; not needed in phase `all`.
        gating_function: similarity in place of the gate that the settings name.

    Attributes:
        thinking_mask: (B, T) bool, the tokens of the thinking phase.
        bag_ids, bag_weights: (B, T, K) int32 and float32; K is 0 when nothing can be blended (λ = 0, groups of one).

    Raises:
        ValueError: the phase needs a tokenizer and there is none.
    """

    def __init__(
        self,
        settings: CrossPathSettings,
        group_ids: torch.Tensor,
        max_new_tokens: int,
        tokenizer: Any,
        gating_function: GatingFunction | None,
    ):
        rows, device = len(group_ids), group_ids.device
        self.settings = settings
        self.groups = PathGroups(group_ids)
        self._marker: AnswerMarker | None = None
        if settings.cross_path_phase == "thinking":
            if tokenizer is None:
                raise ValueError(
                    f"tokenizer is needed to find the answer marker {settings.answer_start!r}: pass tokenizer=... to "
                    "generate, or set cross_path_phase='all'."
                )
            self._marker = AnswerMarker(tokenizer, settings.answer_start, rows, device)
        self._gate = gating_function or GATES[settings.gating_type].similarity
        self._similarity = SimilaritySums(device)
        self._debug = settings.logs_matrices and self.groups.size <= DEBUG_GROUP_SIZE
        self.blends = settings.cross_path_lambda > 0.0 and self.groups.size > 1
        shape = (rows, max_new_tokens, bag_size(self.groups, settings.cross_path_top_k) if self.blends else 0)
        self.thinking_mask = torch.zeros(shape[:2], dtype=torch.bool, device=device)
        self.bag_ids = torch.zeros(shape, dtype=torch.int32, device=device)
        self.bag_weights = torch.zeros(shape, dtype=torch.float32, device=device)
        logger.info_once(f"M3PO cross-path interaction: {settings.describe()}")

    def record(
        self,
        step: int,
        probs: torch.Tensor,
        completion_ids: torch.Tensor,
        was_unfinished: torch.Tensor,
        unfinished: torch.Tensor,
    ) -> None:
        """Records position `step`: the tokens just sampled and the bags of the inputs they become.

        Args:
            step: the position, a host number.
            probs: (B, V) float32, the distributions the tokens were sampled from.
            completion_ids: (B, step + 1) long.
            was_unfinished, unfinished: (B,) bool, the rows that were going before and that go on after these tokens.
        """
        thinking = was_unfinished
        if self._marker is not None:
            thinking = thinking & ~self._marker.update(completion_ids)
        self.thinking_mask[:, step] = thinking
        if not self.blends:
            return
        active = thinking & unfinished
        weights, similarity, pairs = path_attention(probs, active, self.groups, self.settings.temperature, self._gate)
        self._similarity.add(similarity, pairs)
        self.bag_ids[:, step], self.bag_weights[:, step] = cross_path_bags(
            completion_ids[:, -1], weights, self.groups, self.settings.cross_path_lambda, self.settings.cross_path_top_k
        )
        if self._debug:
            logger.warning(
                f"M3PO step {step}: {int(active.sum())}/{len(active)} paths active\n"
                f"similarity\n{similarity}\nweights\n{weights}"
            )

    def end(self, steps: int) -> dict[str, torch.Tensor]:
        """Cuts the record to `steps` positions; returns the statistics of the rollout, {} if nothing was blended."""
        self.thinking_mask = self.thinking_mask[:, :steps]
        self.bag_ids, self.bag_weights = self.bag_ids[:, :steps], self.bag_weights[:, :steps]
        if not self.blends:
            return {}
        return attention_statistics(self.bag_weights, self.thinking_mask, self.groups, self._similarity)
