# SPDX-License-Identifier: Apache-2.0
"""Gating functions that cannot know which paths are alike: what the blend does without its similarity.

A gating function that does no better than these does nothing by its similarity. The fourth placebo is λ = 0.
"""

from __future__ import annotations

import torch

from .base import TINY, BaseM3POGating
from .parameter_free_gates import CosineGating


class UniformGating(BaseM3POGating):
    """`uniform`: S = 0: equal weight to every active peer, at any temperature."""

    default_temperature = 1.0

    def compute_similarity_matrix(self, probs: torch.Tensor) -> torch.Tensor:
        return probs.new_zeros(*probs.shape[:-1], probs.shape[-2])


class RandomGating(BaseM3POGating):
    """`random`: S = ln x, x exponential, drawn anew in each step from torch's generator.

    At its default temperature of 1 the weights over n peers are uniform on the simplex, Dirichlet(1, ..., 1).
    """

    default_temperature = 1.0

    def compute_similarity_matrix(self, probs: torch.Tensor) -> torch.Tensor:
        return probs.new_empty(*probs.shape[:-1], probs.shape[-2]).exponential_().clamp_min(TINY).log()


class ShuffledGating(CosineGating):
    """`shuffled`: the weights of `baseline`, given to the paths of another group: as strong, and of no information.

    Path i of a group hears, in place of its peer j, the j-th path of the next group of the batch (`other_group`, which
    `exchange_groups` heeds).
    """

    other_group = True
