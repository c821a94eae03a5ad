# SPDX-License-Identifier: Apache-2.0
"""Gates by name (seed 3): `gating_type` says which, `gating_config` its options."""

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

_GATES: dict[str, type[BaseM3POGating]] = {
    "baseline": CosineGating,
    "raw_dot": RawDotProductGating,
    "scaled_dot": ScaledDotProductGating,
    "kl_divergence": KLDivergenceGating,
    "bhattacharyya": BhattacharyyaGating,
    "luong": LuongAttentionGating,
    "bahdanau": BahdanauAttentionGating,
}


def create_gating_function(gating_type: str = "baseline", config: Mapping[str, Any] | None = None) -> BaseM3POGating:
    """A gate by name.

    Raises:
        ValueError: the name is unknown (the message lists the known ones), or an option is.
    """
    return gate_class(gating_type)(config)


def gate_class(gating_type: str) -> type[BaseM3POGating]:
    """The class of a gate, for its default temperature; errors as `create_gating_function`."""
    if gating_type not in _GATES:
        raise ValueError(f"gating_type={gating_type!r} is unknown; set one of {', '.join(list_gating_functions())}.")
    return _GATES[gating_type]


def register_gating_function(gating_type: str, gate: type[BaseM3POGating]) -> None:
    """Makes a gate of somebody else known under a name, e.g. to the flag `gating_type`.

    Raises:
        ValueError: the name is taken by another class.
        TypeError: the class is no `BaseM3POGating`, or has no `default_temperature`.
    """
    if not (isinstance(gate, type) and issubclass(gate, BaseM3POGating)):
        raise TypeError(f"{gate!r} is no subclass of BaseM3POGating.")
    if not hasattr(gate, "default_temperature"):
        raise TypeError(f"{gate.__name__} has no default_temperature; set one that suits the range of its similarity.")
    if _GATES.get(gating_type, gate) is not gate:
        raise ValueError(f"gating_type={gating_type!r} is {_GATES[gating_type].__name__} already; take another name.")
    _GATES[gating_type] = gate


def list_gating_functions() -> list[str]:
    """The names of all gates, those that were registered included."""
    return sorted(_GATES)


def check_gating_fields(gating_type: str | None, gating_config: Mapping[str, Any] | None) -> None:
    """The rule of a model configuration that has a gate.

    Raises:
        ValueError: the gate is unknown or has no parameters, or an option is wrong.
    """
    gate = gate_class(gating_type or "")
    if not gate.learnable:
        raise ValueError(
            f"m3po_gating_type={gating_type!r} has no parameters, so a model has nothing to keep of it; leave "
            "m3po_gating_enabled out."
        )
    gate.structure(gating_config)
