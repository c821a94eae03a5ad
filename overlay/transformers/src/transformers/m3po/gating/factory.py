# SPDX-License-Identifier: Apache-2.0
"""Gating functions by name: `gating_type` says which, `gating_config` its options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import BaseM3POGating
from .learnable_gates import BahdanauAttentionGating, LuongAttentionGating
from .parameter_free_gates import (
    BhattacharyyaGating,
    CosineGating,
    KLDivergenceGating,
    RawDotProductGating,
    ScaledDotProductGating,
)
from .placebos import RandomGating, ShuffledGating, UniformGating

_GATES: dict[str, type[BaseM3POGating]] = {
    "baseline": CosineGating,
    "raw_dot": RawDotProductGating,
    "scaled_dot": ScaledDotProductGating,
    "kl_divergence": KLDivergenceGating,
    "bhattacharyya": BhattacharyyaGating,
    "luong": LuongAttentionGating,
    "bahdanau": BahdanauAttentionGating,
}
_PLACEBOS: dict[str, type[BaseM3POGating]] = {
    "uniform": UniformGating,
    "shuffled": ShuffledGating,
    "random": RandomGating,
}


def create_gating_function(gating_type: str = "baseline", config: Mapping[str, Any] | None = None) -> BaseM3POGating:
    """A gating function by name.

    Raises:
        ValueError: the name is unknown (the message lists the known ones), or an option is.
    """
    return gating_class(gating_type)(config)


def gating_class(gating_type: str) -> type[BaseM3POGating]:
    """The class of a gating function, for its default temperature; errors as `create_gating_function`."""
    known = _GATES | _PLACEBOS
    if gating_type not in known:
        names = ", ".join([*list_gating_functions(), *list_placebos()])
        raise ValueError(f"gating_type={gating_type!r} is unknown; set one of {names}.")
    return known[gating_type]


def register_gating_function(gating_type: str, gating: type[BaseM3POGating]) -> None:
    """Makes a gating function of somebody else known under a name, e.g. to the flag `gating_type`.

    Raises:
        ValueError: the name is taken by another class.
        TypeError: the class is no `BaseM3POGating`, or has no `default_temperature`.
    """
    if not (isinstance(gating, type) and issubclass(gating, BaseM3POGating)):
        raise TypeError(f"{gating!r} is no subclass of BaseM3POGating.")
    if not hasattr(gating, "default_temperature"):
        raise TypeError(
            f"{gating.__name__} has no default_temperature; set one that suits the range of its similarity."
        )
    taken = (_GATES | _PLACEBOS).get(gating_type, gating)
    if taken is not gating:
        raise ValueError(f"gating_type={gating_type!r} is {taken.__name__} already; take another name.")
    _GATES[gating_type] = gating


def list_gating_functions() -> list[str]:
    """The names of all gating functions that look at the paths, those that were registered included."""
    return sorted(_GATES)


def list_placebos() -> list[str]:
    """The names of those that cannot know which paths are alike, see `placebos`."""
    return sorted(_PLACEBOS)


def check_gating_fields(gating_type: str | None, gating_config: Mapping[str, Any] | None) -> None:
    """The rule of a model configuration that has a gating function.

    Raises:
        ValueError: the gating function is unknown or has no parameters, or an option is wrong.
    """
    gating = gating_class(gating_type or "")
    if not gating.learnable:
        raise ValueError(
            f"m3po_gating_type={gating_type!r} has no parameters, so a model has nothing to keep of it; leave "
            "m3po_gating_enabled out."
        )
    gating.structure(gating_config)
