# SPDX-License-Identifier: Apache-2.0
"""How many seeds a study needs: from how the differences of single seeds scattered in earlier runs."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from m3po_lab.core.errors import PROJECT_ROOT, UserError
from m3po_lab.core.files import read_json
from m3po_lab.core.inference import POWER, effect_for, pooled_spread, seeds_for
from m3po_lab.study.measures import Measure, study_measures
from m3po_lab.study.plan import Study


def read_pilots(folders: Sequence[str]) -> list[dict[str, Any]]:
    """The summaries below folders, seen from the current folder or from the project's root.

    Raises:
        UserError: a folder has none.
    """
    summaries = []
    for folder in folders:
        place = next((path for path in (Path(folder), PROJECT_ROOT / folder) if path.is_dir()), None)
        files = [] if place is None else sorted([*place.glob("*.json"), *place.glob("*/summary.json")])
        found = [summary for file in files if (summary := read_json(file)) is not None and "accuracy_after" in summary]
        if not found:
            raise UserError(f"pilots: {folder} has no summary of a finished run.")
        summaries += found
    return summaries


def paired_differences(runs: Sequence[Mapping[str, Any]], measure: Measure) -> list[list[float]]:
    """For each two kinds of runs (mode, gating function, λ) the differences of a measure over their common seeds."""
    kinds: dict[str, dict[int, float]] = {}
    for run in runs:
        value = measure.of(run)
        if value is not None:
            kind = [run["flags"].get(name) for name in ("mode", "gating_type", "cross_path_lambda", "max_steps")]
            kinds.setdefault(repr(kind), {})[run["seed"]] = value
    pairs = combinations(kinds.values(), 2)
    return [[one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())] for one, other in pairs]


def plan_lines(study: Study, pilots: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many seeds would find the smallest effect of a study, and what its own number of seeds would find."""
    measure = study_measures(study.accuracy_level)[study.primary_measure]
    differences = [values for values in paired_differences(pilots, measure) if len(values) > 1]
    if not differences:
        return ["planner: no pilots with two kinds of runs over the same seeds; how seeds scatter is not known"]
    spread, seeds = pooled_spread(differences), len(study.seeds)
    shown = (lambda value: f"{100 * value:.1f} points") if measure.percent else (lambda value: f"{value:.3g}")
    if spread == 0:
        return ["planner: the differences of the pilots do not scatter"]
    return [
        f"planner: the difference of two runs of a seed scatters by {shown(spread)} ({measure.label}, "
        f"{sum(map(len, differences))} differences of pilots)",
        f"planner: {seeds_for(study.smallest_effect, spread)} seeds find a difference of "
        f"{shown(study.smallest_effect)} with a chance of {POWER:.0%}; the {seeds} of this study find "
        f"{shown(effect_for(seeds, spread))}",
    ]
