# SPDX-License-Identifier: Apache-2.0
"""What a study measures of a finished run: numbers from its `summary.json`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

Summary = Mapping[str, Any]
WINDOW = 3  # steps over which the accuracy of the rollouts is averaged before a level counts as reached


@dataclass(frozen=True)
class Measure:
    """A number of a run.

    Args:
        label: in tables and figures.
        of: gives it, None where the run has no such number.
        percent: whether it is a share that is shown in per cent, and its differences in points.
        better: 1 if more is better, -1 if less is, 0 if neither.
    """

    label: str
    of: Callable[[Summary], float | None]
    percent: bool = False
    better: int = 0


def column(run: Summary, name: str) -> list[float]:
    """The values of a column of the log, those of lines without it left out."""
    return [value for value in run["history"].get(name, []) if value is not None]


def mean_of(name: str) -> Callable[[Summary], float | None]:
    """The mean of a column over the run."""
    return lambda run: fmean(values) if (values := column(run, name)) else None


def last_quarter(name: str) -> Callable[[Summary], float | None]:
    """Its mean over the last quarter of the log lines, one at least."""
    return lambda run: fmean(values[-max(1, len(values) // 4) :]) if (values := column(run, name)) else None


def sampled(name: str) -> Callable[[Summary], float | None]:
    """A mean over the held-out problems of which completions were sampled."""
    return lambda run: (run["sampled"] or {}).get(name)


def area_under_curve(run: Summary) -> float | None:
    """The accuracy of the rollouts over the steps, as a mean height (trapezoids)."""
    heights = column(run, "accuracy")
    return float(np.trapezoid(heights)) / (len(heights) - 1) if len(heights) > 1 else None


def steps_to_level(run: Summary, level: float) -> float:
    """The first step at which the accuracy of the rollouts, averaged over `WINDOW` steps, has reached a level.

    One more than the steps of the run where it never does: a lower bound.
    """
    steps, heights = run["history"]["step"], run["history"]["accuracy"]
    for at in range(WINDOW - 1, len(steps)):
        if fmean(heights[at - WINDOW + 1 : at + 1]) >= level:
            return float(steps[at])
    return float(steps[-1] + 1)


MEASURES: dict[str, Measure] = {
    "accuracy": Measure("greedy accuracy", lambda run: run["accuracy_after"], percent=True, better=1),
    "format": Measure("greedy format", lambda run: run["format_after"], percent=True, better=1),
    "area_under_curve": Measure("accuracy of the rollouts, area under the curve", area_under_curve, True, 1),
    "sampled_accuracy": Measure("sampled accuracy", sampled("accuracy"), percent=True, better=1),
    "pass_at_n": Measure("pass@k", sampled("pass_at_n"), percent=True, better=1),
    "majority_vote": Measure("majority vote", sampled("majority_vote"), percent=True, better=1),
    "distinct_answers": Measure("distinct answers of k samples", sampled("distinct_answers")),
    "reward_std": Measure("standard deviation of the rewards, mean over the steps", mean_of("reward_std")),
    "gradient_norm": Measure("gradient norm, mean over the steps", mean_of("grad_norm")),
    "entropy_last": Measure("entropy of the policy, last quarter", last_quarter("entropy")),
    "attention_entropy": Measure("entropy of the attention", mean_of("attention_entropy")),
    "attention_max": Measure("largest weight of the attention", mean_of("attention_max")),
    "blend_kl": Measure("KL of the blend, nats", mean_of("blend_kl")),
    "peer_differs": Measure("positions where a peer has another token", mean_of("peer_differs"), percent=True),
    "seconds_per_step": Measure("seconds per step", lambda run: run["seconds_per_step"], better=-1),
}
STEPS_TO_LEVEL = "steps_to_level"


def study_measures(level: float | None) -> dict[str, Measure]:
    """The measures of a study, `steps_to_level` among them if it says a level."""
    if level is None:
        return MEASURES
    label = f"steps until the rollouts are right at {100 * level:.0f} %"
    return {**MEASURES, STEPS_TO_LEVEL: Measure(label, lambda run: steps_to_level(run, level), better=-1)}


def outcomes(run: Summary) -> np.ndarray:
    """Which held-out problems the run answers right after training: (P,) of 0.0 and 1.0."""
    return np.array([float(digit) for digit in run["correct_after"]])


def by_seed(runs: Sequence[Summary], variant: str) -> dict[int, Summary]:
    """The runs of a variant by their seeds."""
    return {run["seed"]: run for run in runs if run["variant"] == variant}
