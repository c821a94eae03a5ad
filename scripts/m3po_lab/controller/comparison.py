# SPDX-License-Identifier: Apache-2.0
"""What the fits are worth on the test split, and their differences with intervals, paired by seed and problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from m3po_lab.controller.fits import BANDIT, PPO, RANDOM, SEARCH
from m3po_lab.controller.policy import CONSTANT
from m3po_lab.core.inference import Difference, difference, holm

DEFAULT, IDENTITY = "gate 1", "gate 0"
MEASURES = {"dense": "log-prob of the reference over gate 1, nats a token", "correct": "accuracy"}
AGAINST_DEFAULT = (PPO, BANDIT, CONSTANT, SEARCH)
AGAINST_PPO = (CONSTANT, SEARCH, BANDIT, RANDOM)


@dataclass(frozen=True)
class Compared:
    """A difference of two fits.

    Args:
        one: with its kind of gates, e.g. `ppo, layer`.
        other: likewise.
        difference: of a measure.
        p_holm: after Holm's correction over all differences of the measure.
    """

    one: str
    other: str
    difference: Difference
    p_holm: float


def values_by_fit(effects: Mapping[str, Any], results: Sequence[Mapping[str, Any]], measure: str) -> dict[str, Any]:
    """(S, P) float64 of each fit, by `<fit>, <gates>`; gates 0 and 1 are the same in all seeds."""
    found: dict[str, Any] = {}
    for kind in dict.fromkeys(result["gates"] for result in results):
        of_kind = [result["fits"] for result in results if result["gates"] == kind]
        for name in of_kind[0]:
            found[f"{name}, {kind}"] = np.array([fits[name][measure] for fits in of_kind], dtype=float)
    seeds = max(len(values) for values in found.values())
    for name, row in ((IDENTITY, effects["grid"][0]), (DEFAULT, effects["grid"][-1])):
        found[name] = np.tile(np.array(row[measure], dtype=float), (seeds, 1))
    return found


def ceiling(effects: Mapping[str, Any], measure: str) -> np.ndarray:
    """(P) of the oracle: for each problem the best gate of the grid, by this measure of the problem itself."""
    return np.array([row[measure] for row in effects["grid"]], dtype=float).max(0)


def pairs(kinds: Sequence[str]) -> list[tuple[str, str]]:
    """The differences that are looked at, by the names of `values_by_fit`; those that do not exist are left out."""
    found = [(IDENTITY, DEFAULT)]
    for kind in kinds:
        found += [(f"{name}, {kind}", DEFAULT) for name in AGAINST_DEFAULT]
        found += [(f"{PPO}, {kind}", f"{name}, {kind}") for name in AGAINST_PPO]
    found += [(f"{PPO}, {kind}", f"{PPO}, {kinds[0]}") for kind in kinds[1:]]
    return found


def compare(
    effects: Mapping[str, Any], results: Sequence[Mapping[str, Any]], measure: str
) -> tuple[dict[str, Any], list[Compared]]:
    """`values_by_fit`, and the differences; with one seed there are none, since the seed is their unit."""
    values = values_by_fit(effects, results, measure)
    kinds = list(dict.fromkeys(result["gates"] for result in results))
    if min(len(one) for one in values.values()) < 2:
        return values, []
    looked_at = [(one, other) for one, other in pairs(kinds) if one in values and other in values]
    found = [difference(values[one] - values[other]) for one, other in looked_at]
    corrected = holm([one.p_value for one in found])
    return values, [
        Compared(one, other, gap, p) for (one, other), gap, p in zip(looked_at, found, corrected, strict=True)
    ]
