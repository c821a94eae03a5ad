# SPDX-License-Identifier: Apache-2.0
"""M3PO: paths of one prompt that look at each other while they think (arXiv 2512.01485, eq. 2-6).

The patches of this overlay call into this package from `_sample` (generation) and from the forward of the Llama and
Qwen2 models; everything else lives here.

Axes, in every docstring of the package: B rows (paths of all prompts), N paths of the largest group, G groups,
T completion positions, L input positions, K bag entries, V vocabulary, H hidden size.

A *group* is the paths of one prompt. A *bag* is a thinking vector written as token ids (B, T, K) int32 and weights
(B, T, K) float32: the vector is the weighted sum of the embeddings of these tokens. A position whose weights are all
zero has no bag: there the model gets the embedding of its own token.
"""

from .checkpoint import CHECKPOINT_FILE, read_checkpoint_info, write_checkpoint_info
from .generate import generate_with_m3po
from .interaction import PathGroups, apply_cross_path_interaction, cosine_similarity, cross_path_weights
from .settings import CrossPathSettings
from .state import M3POGenerateOutput, M3POGenerationState

__all__ = [
    "CHECKPOINT_FILE",
    "CrossPathSettings",
    "M3POGenerateOutput",
    "M3POGenerationState",
    "PathGroups",
    "apply_cross_path_interaction",
    "cosine_similarity",
    "cross_path_weights",
    "generate_with_m3po",
    "read_checkpoint_info",
    "write_checkpoint_info",
]
