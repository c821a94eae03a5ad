# SPDX-License-Identifier: Apache-2.0
"""Gating functions: how alike two paths' distributions are, and the weights A that follow.

Axes: (...) any leading ones, usually G groups; N paths of a group; V vocabulary.
"""

from .base import BaseM3POGating
from .factory import create_gating_function, list_gating_functions, list_placebos, register_gating_function
from .learnable_gates import BahdanauAttentionGating, LearnableGating, LuongAttentionGating
from .parameter_free_gates import (
    BhattacharyyaGating,
    CosineGating,
    KLDivergenceGating,
    RawDotProductGating,
    ScaledDotProductGating,
)

__all__ = [
    "BahdanauAttentionGating",
    "BaseM3POGating",
    "BhattacharyyaGating",
    "CosineGating",
    "KLDivergenceGating",
    "LearnableGating",
    "LuongAttentionGating",
    "RawDotProductGating",
    "ScaledDotProductGating",
    "create_gating_function",
    "list_gating_functions",
    "list_placebos",
    "register_gating_function",
]
