# SPDX-License-Identifier: Apache-2.0
"""What the finished runs of a study show: numbers only; `study_report` writes them down."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import chi2
from statsmodels.stats.anova import AnovaRM

from m3po_lab.core.inference import (
    LEVEL,
    Difference,
    bootstrap_interval,
    difference,
    holm,
    interquartile_mean,
)
from m3po_lab.study.measures import Measure, by_seed, outcomes, study_measures
from m3po_lab.study.plan import Study


@dataclass(frozen=True)
class Comparison:
    """One variant minus another over the seeds that both have.

    Args:
        one, other: the variants.
        difference: of the measure.
        bootstrap: 95 % interval by the hierarchical bootstrap; None of a measure that is no primary one.
        holm_p: p after Holm's correction over all comparisons of the primary measure; None of other measures.
        equivalence_p: of a difference beyond the margin; None of other measures.
    """

    one: str
    other: str
    difference: Difference
    bootstrap: tuple[float, float] | None = None
    holm_p: float | None = None
    equivalence_p: float | None = None

    @property
    def verdict(self) -> str:
        """What the comparison shows, in a word or two."""
        if self.holm_p is not None and self.holm_p < LEVEL:
            return "more" if self.difference.estimate > 0 else "less"
        if self.equivalence_p is not None and self.equivalence_p < LEVEL:
            return "equivalent"
        return "not decided"


@dataclass(frozen=True)
class Omnibus:
    """Whether the gates differ among each other at all: repeated-measures ANOVA over their common seeds."""

    f_value: float
    freedom: tuple[float, float]
    p_value: float
    seeds: int


class Analysis:
    """A study's results.

    Args:
        study: what was written down.
        runs: the finished runs, each a summary with variant and seed.
    """

    def __init__(self, study: Study, runs: Sequence[Mapping[str, Any]]) -> None:
        self.study, self.runs = study, runs
        self.measures = study_measures(study.accuracy_level)
        self.primary = self.measures[study.primary_measure]
        self.variants = [name for name in study.variants if by_seed(runs, name)]

    def values(self, variant: str, measure: Measure) -> dict[int, float]:
        """A measure of the runs of a variant by seed; runs without it are left out."""
        found = {seed: measure.of(run) for seed, run in by_seed(self.runs, variant).items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def differences(self, one: str, other: str, measure: Measure) -> np.ndarray:
        """(S,) of a measure over the common seeds, or of the greedy accuracy (S, P), by problem too."""
        if measure is self.measures["accuracy"]:
            runs = by_seed(self.runs, one), by_seed(self.runs, other)
            seeds = sorted(runs[0].keys() & runs[1].keys())
            return np.array([outcomes(runs[0][seed]) - outcomes(runs[1][seed]) for seed in seeds])
        values = self.values(one, measure), self.values(other, measure)
        return np.array([values[0][seed] - values[1][seed] for seed in sorted(values[0].keys() & values[1].keys())])

    def compare(self) -> list[Comparison]:
        """The comparisons of the primary measure that have two seeds at least."""
        pairs = [(pair, self.differences(*pair, self.primary)) for pair in self.study.pairs]
        enough = [(pair, values) for pair, values in pairs if len(values) > 1]
        found = [difference(values) for _, values in enough]
        corrected = holm([one.p_value for one in found])
        return [
            Comparison(*pair, one, bootstrap_interval(values), corrected_p, one.equivalence_p(self.study.margin))
            for (pair, values), one, corrected_p in zip(enough, found, corrected, strict=True)
        ]

    def secondary(self, measure: Measure) -> list[Comparison]:
        """Each variant against the control in another measure; p and intervals are those of one comparison alone."""
        control = self.study.control
        pairs = [(name, self.differences(name, control, measure)) for name in self.variants if name != control]
        return [Comparison(name, control, difference(values)) for name, values in pairs if len(values) > 1]

    def omnibus(self) -> Omnibus | None:
        """Whether the gates differ in the primary measure; None with fewer than two gates or seeds."""
        values = {gate: self.values(gate, self.primary) for gate in self.study.gates if gate in self.variants}
        seeds = set.intersection(*(set(each) for each in values.values())) if values else set()
        if len(values) < 2 or len(seeds) < 2:
            return None
        rows = [(gate, seed, own[seed]) for gate, own in values.items() for seed in seeds]
        table = pd.DataFrame(rows, columns=["gate", "seed", "value"])
        if table.groupby("seed")["value"].nunique().max() == 1:
            return None  # nothing differs, and there is nothing to divide by
        fitted = AnovaRM(table, "value", "seed", within=["gate"]).fit().anova_table.iloc[0]
        freedom = float(fitted["Num DF"]), float(fitted["Den DF"])
        return Omnibus(float(fitted["F Value"]), freedom, float(fitted["Pr > F"]), len(seeds))

    def spread(self, variant: str) -> tuple[float, float, float] | None:
        """Standard deviation of the primary measure over the seeds, with its 95 % interval; None of one seed."""
        values = list(self.values(variant, self.primary).values())
        if len(values) < 2:
            return None
        squares, freedom = float(np.var(values)) * len(values), len(values) - 1
        low, high = (float(np.sqrt(squares / chi2.ppf(level, freedom))) for level in (1 - LEVEL / 2, LEVEL / 2))
        return float(np.sqrt(squares / freedom)), low, high

    def level(self, variant: str, measure: Measure) -> tuple[float, float, int] | None:
        """Mean and interquartile mean of a measure over the seeds, and their number; None where no run has it."""
        values = list(self.values(variant, measure).values())
        return (fmean(values), interquartile_mean(values), len(values)) if values else None
