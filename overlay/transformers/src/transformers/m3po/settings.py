# SPDX-License-Identifier: Apache-2.0
"""The hyperparameters of a thinking mode, with their rules.

`GenerationConfig` carries the same names as plain attributes, all None unless asked for, so that saved configurations
do not change; `ThinkingSettings.from_generation_config` turns them into checked values.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from .debugging import debugging
from .flags import has_gating, has_residual_gate
from .gating.factory import gating_class
from .gating.matched_temperature import MATCH
from .thinking.interaction import Temperature, check_temperature

if TYPE_CHECKING:
    from ..generation import GenerationConfig

PHASES = ("thinking", "all")
# Modes in which paths interact, and modes whose model has the residual gate; `none` has no settings.
CROSS_PATH_MODES = ("m3po", "h3po")
RESIDUAL_MODES = ("hrpo", "h3po")
DEFAULT_THOUGHT_TOP_K = 64
DEFAULT_GATING_TYPE = "baseline"
# What a soft thought needs, with or without peers; the other numbers say how paths interact.
THOUGHT_FLAGS = ("thought_top_k", "cross_path_phase", "answer_start", "debug")


@dataclass(frozen=True)
class ThinkingSettings:
    """What the model reads at a thinking position.

    Args:
        mode: `m3po`, `hrpo` or `h3po`.
        cross_path_lambda: λ of eq. 2, the share of the peers in the thinking input, in [0, 1]. At 0 nothing is blended
            and decoding is the plain one, bit for bit.
        cross_path_temp: T of eq. 5, above 0. None takes the default of the gating function (`baseline`: 0.1); `match`
            takes, in each group and step, the T at which the attention has the entropy of the baseline's at its
            default.
        cross_path_phase: `thinking` blends until the answer marker is complete in the completion; `all` blends to the
            end (the ablation "no phase isolation").
        thought_top_k: likeliest tokens of a distribution that are kept, as a soft thought (modes hrpo and h3po) and for
            a learnable gating function; 0 keeps the whole vocabulary.
        cross_path_top_k: keep this many peers per path, those with the largest weights; None keeps all.
        answer_start: the answer marker.
        gating_type: name of the gating function, one of `transformers.m3po.gating.list_gating_functions()` or
            `list_placebos()`.
        gating_config: options of the gating function. `temperature` is an alias of `cross_path_temp`, `debug` of
            `debug`.
        debug: log every step: active paths, attention statistics, the matrices of small groups (also `M3PO_DEBUG=1`).

    Raises:
        ValueError: one line that names the flag, its rule and what to set.
    """

    mode: str = "m3po"
    cross_path_lambda: float = 0.1
    cross_path_temp: Temperature | None = None
    cross_path_phase: str = "thinking"
    cross_path_top_k: int | None = None
    thought_top_k: int = DEFAULT_THOUGHT_TOP_K
    answer_start: str = "####"
    gating_type: str = DEFAULT_GATING_TYPE
    gating_config: dict[str, Any] = field(default_factory=dict)
    debug: bool = False

    def __post_init__(self) -> None:
        known = sorted({*CROSS_PATH_MODES, *RESIDUAL_MODES})
        if self.mode not in known:
            raise ValueError(f"mode={self.mode!r} is unknown here; set one of {', '.join(known)}.")
        if not isinstance(self.thought_top_k, int) or self.thought_top_k < 0:
            raise ValueError(
                f"thought_top_k={self.thought_top_k} is no whole number from 0 on; set the number of entries to keep, "
                "or 0 for the whole vocabulary."
            )
        if not 0.0 <= self.cross_path_lambda <= 1.0:
            raise ValueError(f"cross_path_lambda={self.cross_path_lambda} is outside [0, 1]; the paper uses 0.1.")
        if self.cross_path_phase not in PHASES:
            raise ValueError(f"cross_path_phase={self.cross_path_phase!r} is unknown; set one of {', '.join(PHASES)}.")
        if self.cross_path_top_k is not None and self.cross_path_top_k < 1:
            raise ValueError(
                f"cross_path_top_k={self.cross_path_top_k} keeps no peer; set 1 or more, or leave it out to keep all."
            )
        if not self.answer_start:
            raise ValueError('answer_start is empty; set the text that opens the answer, e.g. "####".')
        gating = gating_class(self.gating_type)
        options = gating.known_options()
        unknown = set(self.gating_config) - set(options)
        if unknown:
            raise ValueError(
                f"gating_config has no option {', '.join(sorted(map(repr, unknown)))} for gating function "
                f"{self.gating_type!r}; it takes {' and '.join(options)}."
            )
        alias = self.gating_config.get("temperature")
        if alias is not None and self.cross_path_temp is not None and alias != self.cross_path_temp:
            raise ValueError(
                f"cross_path_temp={self.cross_path_temp} and gating_config temperature={alias} contradict each other; "
                "set one of them."
            )
        check_temperature("cross_path_temp", self.temperature)
        if gating.learnable:
            gating.structure(self.gating_config)

    @property
    def logs_steps(self) -> bool:
        """Whether every step is logged: `debug` here, in `gating_config`, or `M3PO_DEBUG=1`."""
        return self.debug or bool(self.gating_config.get("debug")) or debugging()

    @property
    def temperature(self) -> Temperature:
        """T of eq. 5: `cross_path_temp`, else the alias in `gating_config`, else the default of the gating function."""
        for value in (self.cross_path_temp, self.gating_config.get("temperature")):
            if value is not None:
                return value if value == MATCH else float(value)
        return gating_class(self.gating_type).default_temperature

    @property
    def learns(self) -> bool:
        """Whether paths interact through a gating function with parameters."""
        return self.mode in CROSS_PATH_MODES and gating_class(self.gating_type).learnable

    @property
    def crosses(self) -> bool:
        """Whether the paths of a group are blended: not in mode `hrpo`, and not at λ = 0."""
        return self.mode in CROSS_PATH_MODES and self.cross_path_lambda > 0.0

    @property
    def has_thoughts(self) -> bool:
        """Whether soft thoughts are mixed in by the residual gate."""
        return self.mode in RESIDUAL_MODES

    @classmethod
    def from_generation_config(cls, generation_config: GenerationConfig, model: Any) -> ThinkingSettings | None:
        """Settings of a `generate` call: the mode follows from `enable_cross_path` and from the model's residual gate.

        None when it has neither. `model.answer_start`, if set, is the default of `answer_start`, and the
        learnable gating function of a model that has one is that of `gating_type`.
        """
        crosses, has_gate = bool(generation_config.enable_cross_path), has_residual_gate(model)
        if not crosses and not has_gate:
            return None
        mode = "h3po" if crosses and has_gate else "m3po" if crosses else "hrpo"
        names = cls.__dataclass_fields__.keys() - {"mode"}
        values = {name: getattr(generation_config, name, None) for name in names}
        if values["answer_start"] is None:
            values["answer_start"] = getattr(model, "answer_start", None)
        if values["gating_type"] is None and has_gating(model):
            values["gating_type"] = model.config.m3po_gating_type
        return cls(mode=mode, **{name: value for name, value in values.items() if value is not None})

    def hyperparameters(self) -> dict[str, Any]:
        """The mode and the numbers that it has, T resolved: what a checkpoint says of itself."""
        without = set() if self.has_thoughts or self.learns else {"thought_top_k"}
        if self.mode not in CROSS_PATH_MODES:
            without |= self.__dataclass_fields__.keys() - {"mode", *THOUGHT_FLAGS}
        parts = asdict(self) | {"cross_path_temp": self.temperature}
        return {name: value for name, value in parts.items() if name not in without}

    def _gating(self) -> str:
        """The name of the gating function, with its options but for the temperature, which stands beside it."""
        options = {name: value for name, value in self.gating_config.items() if name != "temperature"}
        parts = ", ".join(f"{name}={value}" for name, value in options.items())
        return f"{self.gating_type} ({parts})" if parts else self.gating_type

    def describe(self) -> str:
        """One line: the numbers that the mode has, phase and answer marker."""
        parts = []
        if self.mode in CROSS_PATH_MODES:
            parts += [
                f"lambda={self.cross_path_lambda}",
                f"temperature={self.temperature}",
                f"gating_type={self._gating()}",
            ]
            parts += [] if self.cross_path_top_k is None else [f"top_k={self.cross_path_top_k}"]
        if self.has_thoughts or self.learns:
            parts.append(f"thought_top_k={self.thought_top_k}")
        return ", ".join([*parts, f"phase={self.cross_path_phase}", f"answer marker {self.answer_start!r}"])
