# SPDX-License-Identifier: Apache-2.0
"""What a call of `generate` cannot ask for: refused before anything is decoded, in one line that names the mend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..aslr.settings import ASLR_HYPERPARAMETERS
from ..flags import ADD_A_FAMILY, SUPPORTED_MODEL_TYPES, check_aslr_overrides, has_aslr, has_gating, has_residual_gate
from ..modules import refuse_nested
from ..settings import THOUGHT_FLAGS, ThinkingSettings

if TYPE_CHECKING:
    from ...generation import GenerationConfig, GenerationMode


def check_model(model: Any, settings: ThinkingSettings) -> None:
    model_type = model.config.model_type
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ValueError(
            f"enable_cross_path is built into {', '.join(SUPPORTED_MODEL_TYPES)} models; this one is {model_type!r}. "
            f"Set enable_cross_path=False, take another model, or add this one ({ADD_A_FAMILY})."
        )
    if settings.has_thoughts != has_residual_gate(model):
        mend = (
            "m3po, or load the model with thinking_residual_enabled=True" if settings.has_thoughts else "hrpo or h3po"
        )
        raise ValueError(
            f"mode={settings.mode!r} does not fit a model {'without' if settings.has_thoughts else 'with'} a residual "
            f"gate; set mode {mend}."
        )


def check_generation_mode(
    model: Any,
    generation_mode: GenerationMode | str,
    generation_config: GenerationConfig | None,
    generation_mode_kwargs: dict[str, Any] | None = None,
    custom_generate: Any = None,
) -> None:
    """Hook of `generate` and of continuous batching: thinking modes decode in upstream's `_sample` only.

    Args:
        model: the model that generates.
        generation_mode: upstream's name of the decoding method that was chosen.
        generation_config: as it is used, with the model's defaults filled in.
        generation_mode_kwargs: arguments of the decoding method; `m3po` is looked at.
        custom_generate: the argument of `generate`.

    Raises:
        ValueError: `enable_cross_path`, `m3po=` or a model with a residual gate or ASLR with beam search, assisted or
            continuous-batching generation or a decoding loop of somebody else; a number of a mode that is not on, or
            one of ASLR that breaks its rule or does nothing on this model.
    """
    state = (generation_mode_kwargs or {}).get("m3po")
    refuse_nested(model)
    _check_aslr(model, generation_config, state)
    enabled = getattr(generation_config, "enable_cross_path", None)
    has_gate = has_residual_gate(model)
    if enabled is not False:  # False says that the numbers are off on purpose
        reads = has_gate or has_gating(model) or getattr(getattr(state, "gating_function", None), "learnable", False)
        _check_nothing_is_lost(generation_config, bool(enabled), has_gate, reads, state)
    if not enabled and state is None and not has_gate and not has_aslr(model):
        return
    from ...generation import GenerationMixin

    mode = getattr(generation_mode, "value", generation_mode)
    if custom_generate is not None or type(model)._sample is not GenerationMixin._sample:
        mode = "a decoding loop other than upstream's"
    if mode not in ("greedy_search", "sample"):
        what, way_out = "enable_cross_path", "enable_cross_path=False"
        if has_gate:
            what, way_out = "a model with a residual gate", "config.thinking_residual_enabled=False"
        why = "its paths must be decoded step by step"
        if has_aslr(model) and not enabled and not has_gate:
            what, way_out = "a model with ASLR", "config.aslr_enabled=False for this call"
            why = "its rows must keep the seeds of their noise"
        raise ValueError(
            f"{what} does not work with {mode}: {why}. Set num_beams=1 and leave out assistants, custom_generate and "
            f"continuous batching, or set {way_out}."
        )


def _check_aslr(model: Any, generation_config: GenerationConfig | None, state: Any) -> None:
    """Refuses what a call says of ASLR and would not be heeded."""
    for name in ASLR_HYPERPARAMETERS:
        if getattr(generation_config, name, None) is not None:
            raise ValueError(f"{name} in a generation config is not read: give it to the call, generate({name}=...).")
    if state is None:
        return
    check_aslr_overrides(model, state.aslr_overrides)
    if state.has_given_seeds and not has_aslr(model):
        raise ValueError("row_seeds do nothing on a model without ASLR; leave them out.")
    if state.aslr_overrides and getattr(generation_config, "is_m3po_inference", None):
        name = next(iter(state.aslr_overrides))
        raise ValueError(f"{name} does nothing with is_m3po_inference=True, which skips ASLR; leave one of them out.")


def _check_nothing_is_lost(
    generation_config: GenerationConfig | None,
    enabled: bool,
    has_gate: bool,
    reads_likeliest: bool,
    state: Any,
) -> None:
    """Refuses a number that the call would ignore: of a mode that is not on, or beside a state that has its own."""
    names = [*ThinkingSettings.__dataclass_fields__, "return_thinking_embeds"]
    requested = [name for name in names if name != "mode" and getattr(generation_config, name, None) is not None]
    if state is not None and state.settings is not None:
        requested = ["enable_cross_path"] * enabled + [name for name in requested if name != "return_thinking_embeds"]
        if requested:
            raise ValueError(
                f"{requested[0]} and m3po=M3POGenerationState(settings=...) both give the hyperparameters of the mode; "
                "leave one of them out."
            )
        return
    if "thought_top_k" in requested and not reads_likeliest:
        raise ValueError(
            "thought_top_k does nothing on a model without a residual gate or a learnable gating function; leave it "
            "out."
        )
    useful = (*THOUGHT_FLAGS, "return_thinking_embeds") if has_gate else ()
    requested = [name for name in requested if not enabled and name not in useful]
    if requested:
        raise ValueError(
            f"{requested[0]} does nothing without enable_cross_path: set enable_cross_path=True as well (False says "
            "that it is off on purpose), or leave it out."
        )
