# SPDX-License-Identifier: Apache-2.0
"""The statistics of a study: differences of two variants over training seeds and held-out problems.

The training seed is the unit. Both variants of a pair have a run for each seed, with the same order of the training
problems, and answer the same held-out problems, so that a difference d of seed s and problem p exists for all pairs
(s, p): seeds and problems are crossed. The mean difference has the variance (two-way random effects, e.g. Searle,
Variance Components, 1992, section 5.2)

    Var = V_seeds + V_problems - V_both,

where V_seeds is the variance of the seeds' means over their number, V_problems likewise, and V_both, which both
contain, that of what is left over. Its degrees of freedom are Satterthwaite's. It says what would be found with other
seeds and other problems of the kind. Where V_problems is no more than V_both, and of a measure without problems, it is
the paired t-test over the seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.optimize import brentq
from scipy.stats import nct, norm, t, trim_mean
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

LEVEL = 0.05
POWER = 0.8
DRAWS = 10_000  # of a bootstrap


@dataclass(frozen=True)
class Difference:
    """The mean difference of two variants.

    Args:
        estimate: the mean, in the unit of the measure.
        error: its standard error.
        freedom: degrees of freedom.
        seeds: how many both have.
    """

    estimate: float
    error: float
    freedom: float
    seeds: int

    def interval(self, confidence: float = 1 - LEVEL) -> tuple[float, float]:
        """The interval of the mean."""
        half = float(t.ppf(0.5 + confidence / 2, self.freedom)) * self.error
        return self.estimate - half, self.estimate + half

    @property
    def p_value(self) -> float:
        """Two-sided, of no difference; 1 where nothing scatters and nothing can be tested."""
        if self.error == 0:
            return 1.0
        return float(2 * t.sf(abs(self.estimate) / self.error, self.freedom))

    def equivalence_p(self, margin: float) -> float:
        """Of a difference of at least `margin` either way, by two one-sided tests (Schuirmann 1987)."""
        if self.error == 0:
            return 1.0
        above = t.sf((self.estimate + margin) / self.error, self.freedom)
        below = t.cdf((self.estimate - margin) / self.error, self.freedom)
        return float(max(above, below))

    @property
    def detectable(self) -> float | None:
        """The smallest true difference that the two-sided test would have found with a chance of `POWER`.

        None where nothing scatters.
        """
        if self.error == 0:
            return None
        critical = t.ppf(1 - LEVEL / 2, self.freedom)
        shift = brentq(lambda shift: POWER - nct.sf(critical, self.freedom, shift), 0.0, 4 * critical)
        return float(shift) * self.error


def difference(values: np.ndarray) -> Difference:
    """The mean of differences by seed, and where there are problems, by seed and problem.

    Args:
        values: (S,) or (S, P), S >= 2 seeds and P >= 2 problems.

    Raises:
        ValueError: there are fewer.
    """
    if min(values.shape) < 2:
        raise ValueError(f"{values.shape} differences: two seeds and two problems are the least.")
    seeds = values.shape[0]
    by_seed = values if values.ndim == 1 else values.mean(1)
    of_seeds = by_seed.var(ddof=1) / seeds
    mean = float(by_seed.mean())
    if values.ndim == 1:
        return Difference(mean, float(np.sqrt(of_seeds)), seeds - 1, seeds)
    problems = values.shape[1]
    by_problem = values.mean(0)
    of_problems = by_problem.var(ddof=1) / problems
    rest = values - by_seed[:, None] - by_problem + mean
    freedom_of_rest = (seeds - 1) * (problems - 1)
    of_rest = (rest**2).sum() / freedom_of_rest / values.size
    if of_problems <= of_rest:  # the problems add nothing: the paired t-test over the seeds
        return Difference(mean, float(np.sqrt(of_seeds)), seeds - 1, seeds)
    variance = of_seeds + of_problems - of_rest
    spread = of_seeds**2 / (seeds - 1) + of_problems**2 / (problems - 1) + of_rest**2 / freedom_of_rest
    return Difference(mean, float(np.sqrt(variance)), float(variance**2 / spread), seeds)


def holm(p_values: Sequence[float]) -> list[float]:
    """p after Holm's correction, in their order."""
    return [float(value) for value in multipletests(p_values, method="holm")[1]] if len(p_values) else []


def interquartile_mean(values: Sequence[float]) -> float:
    """Mean of the middle half (rliable, 2108.13264)."""
    return float(trim_mean(values, 0.25))


def bootstrap_interval(values: np.ndarray, confidence: float = 1 - LEVEL, seed: int = 0) -> tuple[float, float]:
    """Hierarchical bootstrap of the mean of `values`, over seeds and, where there are any, problems.

    Seeds and problems are drawn for themselves, and the deviations of both are added; what both contain (`V_both`) is
    taken out of the problems' part, and the seeds' part is as wide as that of S seeds is (S / (S - 1)). The levels of
    the percentiles are those of t with as many degrees of freedom as `difference` has (Hesterberg 2015, section 5.3),
    because few seeds make percentiles too narrow.

    Args:
        values: (S,) or (S, P).
        confidence: of the interval.
        seed: of the draws.
    """
    whole = difference(values)
    seeds = len(values)

    def deviations(means: np.ndarray) -> np.ndarray:
        number = len(means)
        return (resampled(number, DRAWS, seed) @ means - means.mean()) * np.sqrt(number / (number - 1))

    by_seed = values if values.ndim == 1 else values.mean(1)
    draws = deviations(by_seed)
    if values.ndim == 2:
        by_problem = values.mean(0)
        of_seeds, of_problems = by_seed.var(ddof=1) / seeds, by_problem.var(ddof=1) / values.shape[1]
        own = max(0.0, whole.error**2 - of_seeds)  # V_problems - V_both
        draws = draws + deviations(by_problem) * np.sqrt(own / of_problems if of_problems else 0.0)
    tail = float(norm.cdf(t.ppf((1 - confidence) / 2, whole.freedom)))
    low, high = np.quantile(draws, [tail, 1 - tail])
    return whole.estimate + float(low), whole.estimate + float(high)


@lru_cache(maxsize=4)
def resampled(number: int, draws: int, seed: int) -> np.ndarray:
    """(draws, number) weights of the things that a bootstrap draws with replacement, the same in every call."""
    random = np.random.default_rng((seed, number))
    return random.multinomial(number, [1 / number] * number, size=draws) / number


def seeds_for(effect: float, spread: float) -> int:
    """How many seeds a paired t-test wants to find an effect with a chance of `POWER`.

    Args:
        effect: the true difference, above 0.
        spread: the standard deviation of the differences of single seeds.
    """
    number = TTestPower().solve_power(effect_size=effect / spread, alpha=LEVEL, power=POWER, alternative="two-sided")
    return max(2, int(np.ceil(number)))


def effect_for(seeds: int, spread: float) -> float:
    """The smallest true difference that a paired t-test over so many seeds finds with a chance of `POWER`."""
    size = TTestPower().solve_power(nobs=seeds, alpha=LEVEL, power=POWER, alternative="two-sided")
    return float(size) * spread


def pooled_spread(samples: Sequence[Sequence[float]]) -> float:
    """The standard deviation within several samples, weighted by their degrees of freedom."""
    squares = sum(float(np.var(one)) * len(one) for one in samples)
    return float(np.sqrt(squares / sum(len(one) - 1 for one in samples)))
