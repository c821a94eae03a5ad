# SPDX-License-Identifier: Apache-2.0
"""Statistics of a before/after comparison on the same problems.

`mcnemar_p`: McNemar's exact test, that is a two-sided binomial test of the problems whose outcome changed.
`difference_interval`: the adjusted Wald interval of Agresti and Min (Statistics in Medicine 24, 2005) for the
difference of two paired proportions; it adds one half to each of the four cells, which mends the plain interval's
coverage.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import binomtest, norm


@dataclass(frozen=True)
class Paired:
    """Outcomes of n problems, before and after: the two accuracies, what changed, and what that means."""

    n: int
    before: float
    after: float
    gained: int
    lost: int
    p_value: float
    interval: tuple[float, float]

    def significant(self, level: float = 0.05) -> bool:
        """Whether the exact test rejects 'nothing changed'."""
        return self.p_value < level


def compare(before: Sequence[bool], after: Sequence[bool]) -> Paired:
    """Compare the outcomes of the same problems; with no problem at all the accuracies are 0 and p is 1.

    Raises:
        ValueError: when the two do not have the same length.
    """
    pairs = list(zip(before, after, strict=True))
    gained = sum(late and not early for early, late in pairs)
    lost = sum(early and not late for early, late in pairs)
    n = len(pairs)
    return Paired(
        n=n,
        before=sum(map(bool, before)) / n if n else 0.0,
        after=sum(map(bool, after)) / n if n else 0.0,
        gained=gained,
        lost=lost,
        p_value=mcnemar_p(gained, lost),
        interval=difference_interval(gained, lost, n),
    )


def mcnemar_p(gained: int, lost: int) -> float:
    """The exact two-sided p-value of McNemar's test; 1.0 when nothing changed."""
    if gained + lost == 0:
        return 1.0
    return float(binomtest(gained, gained + lost, 0.5).pvalue)


def difference_interval(gained: int, lost: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Agresti-Min interval of (accuracy after - accuracy before), cut to [-1, 1]."""
    b, c, total = gained + 0.5, lost + 0.5, n + 2
    difference = (b - c) / total
    error = math.sqrt(b + c - (b - c) ** 2 / total) / total
    half = float(norm.ppf(0.5 + confidence / 2)) * error
    return max(-1.0, difference - half), min(1.0, difference + half)


def proportion_interval(right: int, number: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (scipy)."""
    found = binomtest(right, number).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)
