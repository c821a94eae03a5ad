# SPDX-License-Identifier: Apache-2.0
"""The paired test against counting all outcomes, and the interval against its own coverage."""

from fractions import Fraction
from math import comb

import pytest
from scipy.stats import multinomial

from m3po_lab.core import stats


def counted_p(gained: int, lost: int) -> Fraction:
    """Chance of an outcome at least as lopsided, each changed problem going either way with chance one half."""
    n, lopsided = gained + lost, abs(gained - lost)
    return Fraction(sum(comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= lopsided), 2**n)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (5, 5), (6, 0), (35, 17), (17, 35), (71, 6), (200, 150)])
def test_mcnemar_p_equals_counting_all_outcomes(gained: int, lost: int) -> None:
    assert stats.mcnemar_p(gained, lost) == pytest.approx(float(counted_p(gained, lost)), rel=1e-9)


def test_comparison_counts_what_changed() -> None:
    paired = stats.compare([True, True, False, False, False], [True, False, True, True, False])
    assert (paired.n, paired.gained, paired.lost) == (5, 2, 1)
    assert (paired.before, paired.after) == (0.4, 0.6)
    assert paired.interval[0] < 0.2 < paired.interval[1]


def test_comparison_of_no_problems_is_no_evidence() -> None:
    assert stats.compare([], []).p_value == 1.0
    low, high = stats.difference_interval(0, 0, 0)
    assert low < -0.9 and high > 0.9


def test_comparison_of_different_lengths_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        stats.compare([True, False], [True])


@pytest.mark.parametrize(("n", "p_gained", "p_lost"), [(60, 0.175, 0.085), (60, 0.05, 0.01), (20, 0.1, 0.02)])
def test_interval_covers_the_true_difference_as_often_as_it_says(n: int, p_gained: float, p_lost: float) -> None:
    """All outcomes, weighted by their chance. Without the halves the last case is covered 0.87 of the time."""
    chances = multinomial(n, [p_gained, p_lost, 1 - p_gained - p_lost])
    covered = 0.0
    for gained in range(n + 1):
        for lost in range(n + 1 - gained):
            low, high = stats.difference_interval(gained, lost, n)
            if low <= p_gained - p_lost <= high:
                covered += chances.pmf([gained, lost, n - gained - lost])
    assert 0.94 <= covered <= 0.97
