# SPDX-License-Identifier: Apache-2.0
"""The numbers of cross-path interaction, with their rules (seed 1; design, the flag table).

`GenerationConfig` carries the same names as plain attributes, all None unless asked for, so that saved configurations
do not change; `CrossPathSettings.from_generation_config` turns them into checked values.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .interaction import GATES

if TYPE_CHECKING:
    from ..generation import GenerationConfig

PHASES = ("thinking", "all")


@dataclass(frozen=True)
class CrossPathSettings:
    """How the paths of a group interact while they decode.

    Args:
        cross_path_lambda: λ of eq. 2, the share of the peers in the thinking input, in [0, 1]. At 0 nothing is blended
            and decoding is the plain one, bit for bit.
        cross_path_temp: T of eq. 5, above 0. None takes the default of the gate (`baseline`: 0.1).
        cross_path_phase: `thinking` blends until the answer marker is complete in the completion; `all` blends to the
            end (the ablation "no phase isolation" of seed 1).
        cross_path_top_k: keep this many peers per path, those with the largest weights; None keeps all.
        answer_start: the answer marker.
        gating_type: name of the similarity function, a key of `transformers.m3po.interaction.GATES`.
        gating_config: options of the gate. `temperature` is an alias of `cross_path_temp`, `debug` of `debug`.
        debug: log similarity and weight matrices of small groups at every step (also `M3PO_DEBUG=1`).

    Raises:
        ValueError: one line that names the flag, its rule and what to set.
    """

    cross_path_lambda: float = 0.1
    cross_path_temp: float | None = None
    cross_path_phase: str = "thinking"
    cross_path_top_k: int | None = None
    answer_start: str = "####"
    gating_type: str = "baseline"
    gating_config: dict[str, Any] = field(default_factory=dict)
    debug: bool = False

    def __post_init__(self) -> None:
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
        if self.gating_type not in GATES:
            raise ValueError(f"gating_type={self.gating_type!r} is unknown; set one of {', '.join(sorted(GATES))}.")
        unknown = set(self.gating_config) - {"temperature", "debug"}
        if unknown:
            raise ValueError(
                f"gating_config has no option {', '.join(sorted(map(repr, unknown)))} for gate {self.gating_type!r}; "
                "it takes temperature and debug."
            )
        alias = self.gating_config.get("temperature")
        if alias is not None and self.cross_path_temp is not None and alias != self.cross_path_temp:
            raise ValueError(
                f"cross_path_temp={self.cross_path_temp} and gating_config temperature={alias} contradict each other; "
                "set one of them."
            )
        if not self.temperature > 0.0:
            raise ValueError(f"cross_path_temp={self.temperature} is not above 0; the paper uses 0.1.")

    @property
    def logs_matrices(self) -> bool:
        """Whether small groups log their matrices: `debug` here, in `gating_config`, or `M3PO_DEBUG=1`."""
        return self.debug or bool(self.gating_config.get("debug")) or os.environ.get("M3PO_DEBUG") == "1"

    @property
    def temperature(self) -> float:
        """T of eq. 5: `cross_path_temp`, else the alias in `gating_config`, else the default of the gate."""
        for value in (self.cross_path_temp, self.gating_config.get("temperature")):
            if value is not None:
                return float(value)
        return GATES[self.gating_type].default_temperature

    @classmethod
    def from_generation_config(cls, generation_config: GenerationConfig, model: Any) -> CrossPathSettings | None:
        """Settings of a `generate` call, or None when it does not ask for cross-path interaction.

        `model.answer_start`, if set, is the default of `answer_start` (erratum E29).
        """
        if not generation_config.enable_cross_path:
            return None
        names = cls.__dataclass_fields__.keys()
        given = {name: getattr(generation_config, name, None) for name in names}
        if given["answer_start"] is None:
            given["answer_start"] = getattr(model, "answer_start", None)
        return cls(**{name: value for name, value in given.items() if value is not None})

    def describe(self) -> str:
        """One line: λ, T, gate, phase and answer marker."""
        peers = "" if self.cross_path_top_k is None else f", top_k={self.cross_path_top_k}"
        return (
            f"lambda={self.cross_path_lambda}, temperature={self.temperature}, gate={self.gating_type}, "
            f"phase={self.cross_path_phase}{peers}, answer marker {self.answer_start!r}"
        )
