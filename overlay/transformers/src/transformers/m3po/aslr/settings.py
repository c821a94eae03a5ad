# SPDX-License-Identifier: Apache-2.0
"""The hyperparameters of ASLR (adaptive stochastic latent reasoning), with their rules.

The model configuration carries them; a `generate` call and a forward can override all but the number of latent paths.
Imported by the configuration classes, so nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

NUM_HEADS = 8  # of the path collaborator
MAX_PATHS = 1 << 16  # what the noise can number


class ASLRHyperparameters(NamedTuple):
    """P, R and the rest; the fields of the configuration are called `aslr_` and these names.

    Args:
        num_paths: P, latent paths of a position, 1 or more. With 1 the loop is skipped, bit for bit.
        max_iterations: R, rounds of collaboration, 0 or more. With 0 the loop is skipped, bit for bit.
        threshold: router score at which half of the refinement is let in, in [0, 1].
        gumbel_temp: scale of the noise on the latent paths, 0 or more; 0 is deterministic, see `latent_noise`.
        cross_path_lambda: share of the other latent paths in a round, in [0, 1].
        cross_path_temp: temperature of the attention among latent paths, above 0.
    """

    num_paths: int = 4
    max_iterations: int = 2
    threshold: float = 0.5
    gumbel_temp: float = 1.0
    cross_path_lambda: float = 0.1
    cross_path_temp: float = 0.1

    @classmethod
    def of(cls, config: Any, overrides: Mapping[str, Any]) -> ASLRHyperparameters:
        """Those of a model configuration, with those of `overrides` (flag: value) in their place."""
        return cls(*[overrides.get(name, getattr(config, name)) for name in ASLR_HYPERPARAMETERS])

    def describe(self) -> str:
        """One line: the values under their flags."""
        return ", ".join(f"{name}={value}" for name, value in zip(ASLR_HYPERPARAMETERS, self, strict=True))

    @property
    def runs(self) -> bool:
        """Whether there is a loop at all: more than one latent path and at least one round."""
        return self.num_paths > 1 and self.max_iterations > 0


ASLR_HYPERPARAMETERS = tuple(f"aslr_{name}" for name in ASLRHyperparameters._fields)
ASLR_DEFAULTS = dict(zip(ASLR_HYPERPARAMETERS, ASLRHyperparameters(), strict=True))


def check_aslr_hyperparameters(hyperparameters: Mapping[str, Any], hidden_size: int | None = None) -> None:
    """Refuses hyperparameters that ASLR cannot run with.

    Args:
        hyperparameters: flag: value, any of `ASLR_HYPERPARAMETERS`; a None is not looked at.
        hidden_size: H of the model that gets the modules; None leaves it unchecked.

    Raises:
        ValueError: one line that names the flag, its rule and what to set.
    """
    rules = {
        "aslr_num_paths": (lambda value: _whole(value) and 1 <= value < MAX_PATHS, "is no whole number from 1 on"),
        "aslr_max_iterations": (lambda value: _whole(value) and value >= 0, "is no whole number from 0 on"),
        "aslr_threshold": (lambda value: 0.0 <= value <= 1.0, "is outside [0, 1]"),
        "aslr_gumbel_temp": (lambda value: 0.0 <= value < float("inf"), "is not 0 or a positive number"),
        "aslr_cross_path_lambda": (lambda value: 0.0 <= value <= 1.0, "is outside [0, 1]"),
        "aslr_cross_path_temp": (lambda value: 0.0 < value < float("inf"), "is not above 0"),
    }
    for name, (holds, complaint) in rules.items():
        value = hyperparameters.get(name)
        if value is None:
            continue
        if not isinstance(value, int | float):
            raise ValueError(f"{name}={value!r} is a {type(value).__name__}; give a Python number.")
        if not holds(value):
            raise ValueError(f"{name}={value} {complaint}; the default is {ASLR_DEFAULTS[name]}.")
    if hidden_size is not None and hidden_size % NUM_HEADS:
        raise ValueError(
            f"aslr_enabled=True needs a hidden size that the {NUM_HEADS} heads of the path collaborator divide, and "
            f"this model has {hidden_size}; take another model, or set aslr_enabled=False."
        )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
