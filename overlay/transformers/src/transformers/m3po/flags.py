# SPDX-License-Identifier: Apache-2.0
"""The fields that this overlay adds to the configurations of `SUPPORTED_MODEL_TYPES` and of NanoChat, with their rules.

A class decorator under `@strict`, rather than lines in the class body: the bodies of Llama's and Qwen2's are the source
from which upstream generates a good dozen other configurations, which have no such modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .aslr.settings import ASLR_DEFAULTS, check_aslr_hyperparameters
from .hyper_connections.settings import MHC_DEFAULTS, MHC_FIELDS, check_mhc_hyperparameters

# Model types whose forward calls `mix_thinking_inputs`.
SUPPORTED_MODEL_TYPES = ("llama", "qwen2", "qwen3", "smollm3")
ADD_A_FAMILY = "CONTRIBUTING.md, Add a model family"

FIELDS: dict[str, tuple[type | Any, Any]] = {
    "thinking_residual_enabled": (bool, False),
    "thinking_residual_r_min": (int | float, 0.99),
    "thinking_residual_r_max": (int | float, 0.999),
    "aslr_enabled": (bool, False),
    **{name: (int if isinstance(value, int) else int | float, value) for name, value in ASLR_DEFAULTS.items()},
    "m3po_gating_enabled": (bool, False),
    "m3po_gating_type": (str | None, None),
    "m3po_gating_config": (dict | None, None),
    **MHC_FIELDS,
}
SWITCHES = {
    "thinking_residual_": "thinking_residual_enabled",
    "aslr_": "aslr_enabled",
    "m3po_gating_": "m3po_gating_enabled",
    "mhc_": "mhc_enabled",
}


def with_m3po_fields(cls: type) -> type:
    """Declares the fields on a configuration class: typed, saved, loaded and overridable in `from_pretrained`.

    thinking_residual_enabled: the model has HRPO's residual gate (`transformers.m3po.thinking.residual_gate`).
    thinking_residual_r_min, thinking_residual_r_max: bounds of the decay that the residual gate starts with, in (0, 1).
    aslr_enabled: the model has the modules of ASLR (`transformers.m3po.aslr.modules`).
    aslr_num_paths and the other five: their hyperparameters, see `ASLRHyperparameters`.
    m3po_gating_enabled: the model has a learnable gating function (`transformers.m3po.gating.module`).
    m3po_gating_type, m3po_gating_config: its name and the options that say its size.
    mhc_enabled and the others: see `with_mhc_fields`.

    The fields of a system that is off are left out of `to_dict`, so that saved files are upstream's.
    """
    cls = _with_fields(cls, FIELDS)

    def validate_thinking_residual(self: Any) -> None:
        check_bounds(self.thinking_residual_r_min, self.thinking_residual_r_max)

    def validate_aslr(self: Any) -> None:
        size = self.hidden_size if self.aslr_enabled else None
        check_aslr_hyperparameters({name: getattr(self, name) for name in ASLR_DEFAULTS}, size)

    def validate_m3po_gating(self: Any) -> None:
        if self.m3po_gating_enabled:
            from .gating.factory import check_gating_fields  # it needs torch, as the model will

            check_gating_fields(self.m3po_gating_type, self.m3po_gating_config)

    cls.validate_thinking_residual = validate_thinking_residual  # type: ignore[attr-defined]
    cls.validate_aslr = validate_aslr  # type: ignore[attr-defined]
    cls.validate_m3po_gating = validate_m3po_gating  # type: ignore[attr-defined]
    cls.validate_mhc = _validate_mhc  # type: ignore[attr-defined]
    return cls


def with_mhc_fields(cls: type) -> type:
    """Declares the fields of the hyper-connections alone, on the configuration of a model without the other systems.

    mhc_enabled: the model has hyper-connections (`transformers.m3po.hyper_connections.connections`).
    mhc_num_streams: S. mhc_residual: "sinkhorn" or "birkhoff", what makes H_res doubly stochastic.
    mhc_sinkhorn_iters, mhc_sinkhorn_tau: rounds, and what divides the logits; the paper has 20 and no such number.
    mhc_alpha, mhc_diagonal_bias, mhc_stream_offset: the start, see `DynamicMHC` and `StreamOffsets`.
    mhc_gate_noise: in training, the probability that a row draws its routing gate from U(0, 1).
    """
    cls = _with_fields(cls, MHC_FIELDS)
    cls.validate_mhc = _validate_mhc  # type: ignore[attr-defined]
    return cls


def _validate_mhc(self: Any) -> None:
    check_mhc_hyperparameters({name: getattr(self, name) for name in MHC_DEFAULTS})


def _with_fields(cls: type, added: dict[str, tuple[type | Any, Any]]) -> type:
    """The class with these fields, typed, and left out of `to_dict` where their switch is off."""
    cls.__annotations__ = {
        **cls.__dict__.get("__annotations__", {}),
        **{name: kind for name, (kind, _) in added.items()},
    }
    for name, (_, default) in added.items():
        setattr(cls, name, default)
    cls = dataclass(cls, repr=False, kw_only=True)
    missing = set(added) - {entry.name for entry in fields(cls)}
    if missing:
        raise TypeError(
            f"{cls.__name__} did not take the fields {sorted(missing)}; dataclasses work in another way now."
        )
    remove = cls._remove_keys_not_serialized  # type: ignore[attr-defined]

    def _remove_keys_not_serialized(self: Any, saved: dict[str, Any]) -> None:
        remove(self, saved)
        for prefix, switch in SWITCHES.items():
            if saved.get(switch) is False:
                for name in [name for name in saved if name.startswith(prefix)]:
                    del saved[name]

    cls._remove_keys_not_serialized = _remove_keys_not_serialized  # type: ignore[attr-defined]
    return cls


def check_bounds(r_min: float, r_max: float) -> None:
    """Refuses bounds between which no decay can be drawn.

    Raises:
        ValueError: one line that names both flags.
    """
    if not 0.0 < r_min <= r_max < 1.0:
        raise ValueError(
            f"thinking_residual_r_min={r_min} and thinking_residual_r_max={r_max} must be 0 < r_min <= r_max < 1; HRPO "
            "uses 0.99 and 0.999."
        )


def has_residual_gate(model: Any) -> bool:
    """Whether the configuration of a model says that it has the residual gate."""
    return bool(getattr(model.config, "thinking_residual_enabled", False))


def has_aslr(model: Any) -> bool:
    """Whether the configuration of a model says that it has the modules of ASLR."""
    return bool(getattr(model.config, "aslr_enabled", False))


def has_gating(model: Any) -> bool:
    """Whether the configuration of a model says that it has a learnable gating function."""
    return bool(getattr(model.config, "m3po_gating_enabled", False))


def has_hyper_connections(model: Any) -> bool:
    """Whether the configuration of a model, or a configuration, says that it has hyper-connections."""
    return bool(getattr(getattr(model, "config", model), "mhc_enabled", False))


def check_aslr_overrides(model: Any, overrides: Mapping[str, Any]) -> None:
    """Refuses what a call cannot change.

    Args:
        model: the model that is called.
        overrides: flag: value, of `generate` or of a forward.

    Raises:
        ValueError: a number breaks its rule, the model has no ASLR, or `aslr_num_paths` is another than its path
            aggregator was built for.
    """
    if not overrides:
        return
    if not has_aslr(model):
        raise ValueError(
            f"{next(iter(overrides))} does nothing on a model without ASLR: load it with aslr_enabled=True, or leave "
            "it out."
        )
    check_aslr_hyperparameters(overrides)
    built = model.config.aslr_num_paths
    if overrides.get("aslr_num_paths", built) != built:
        raise ValueError(
            f"aslr_num_paths={overrides['aslr_num_paths']}: the path aggregator of this model was built for {built}. "
            "To do without the loop set aslr_max_iterations=0 or is_m3po_inference=True."
        )
