# SPDX-License-Identifier: Apache-2.0
"""The controls on rewards whose best gates are known: what each reaches, and that none spends more than its budget."""

from collections.abc import Callable

import numpy as np
import pytest

from m3po_lab.controller.controls import (
    LinUCB,
    Policy,
    Training,
    best_by_search,
    best_on_grid,
    constant,
    grid_of,
    oracle,
    uniform,
)

PROBLEMS, WIDTH = 200, 16


class Known:
    """Rewards -(gate - target)², mean over d, where targets are 0.2 and 0.8 by a direction of the observations."""

    def __init__(self, size: int, by_problem: bool = True) -> None:
        random = np.random.default_rng(0)
        self.observations = random.normal(size=(PROBLEMS, WIDTH))
        self.observations[:, 3] *= 3
        targets = np.where(self.observations[:, 3] > 0, 0.8, 0.2)
        self.targets = (
            np.repeat(targets[:, None], size, axis=1) if by_problem else np.tile(grid_of(size), (PROBLEMS, 1))
        )
        self.spent = 0

    def evaluate(self, indices: np.ndarray, values: np.ndarray) -> np.ndarray:
        assert values.shape == (len(indices), self.targets.shape[1]) and ((values >= 0) & (values <= 1)).all()
        self.spent += len(indices)
        return -((values - self.targets[indices]) ** 2).mean(1)

    def training(self, budget: int, seed: int = 0) -> Training:
        return Training(self.evaluate, self.observations, self.targets.shape[1], budget, seed)

    def worth(self, policy: Policy) -> float:
        return float(-((policy(self.observations) - self.targets) ** 2).mean())


@pytest.mark.parametrize("size", [1, 4])
def test_a_bandit_sees_what_no_constant_can(size: int):
    known = Known(size)
    found = {
        "bandit": known.worth(LinUCB(known.training(2000), 11)),
        "constant": known.worth(best_on_grid(known.training(2000), 11)),
        "random": known.worth(uniform(size, 0)),
    }
    best = oracle(known.evaluate, PROBLEMS, size, 11)
    assert known.worth(lambda observations: best) == pytest.approx(0.0, abs=1e-12)
    assert found["bandit"] > -0.04 and found["constant"] < -0.08 and found["random"] < found["constant"]


def test_a_search_finds_a_vector_that_no_single_gate_is():
    known = Known(4, by_problem=False)
    searched, single = best_by_search(known.training(4000)), best_on_grid(known.training(4000), 11)
    assert searched(known.observations)[0] == pytest.approx(grid_of(4), abs=0.1)
    assert known.worth(searched) > -0.005 and known.worth(single) == pytest.approx(-0.1389, abs=1e-3)
    with pytest.raises(ValueError, match="two gates or more"):
        best_by_search(Known(1).training(100))


@pytest.mark.parametrize("fit", [lambda t: best_on_grid(t, 11), best_by_search, lambda t: LinUCB(t, 11)])
@pytest.mark.parametrize("budget", [500, 3000])
def test_no_fit_spends_more_than_its_budget_or_much_less(fit: Callable[[Training], Policy], budget: int):
    known = Known(4)
    fit(known.training(budget))
    assert known.spent <= budget
    assert known.spent >= min(0.4 * budget, 11 * PROBLEMS * 0.9)  # a generation of the search is 256 pairs


@pytest.mark.parametrize("fit", [lambda t: best_on_grid(t, 11), best_by_search, lambda t: LinUCB(t, 11)])
def test_equal_seeds_are_equal_fits(fit: Callable[[Training], Policy]):
    known = Known(3)
    first, again, other = (fit(known.training(1500, seed))(known.observations) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert first.shape == other.shape == (PROBLEMS, 3)


def test_a_constant_does_not_look():
    values = np.array([0.25, 0.5])
    assert constant(values)(np.zeros((3, 7))).tolist() == [[0.25, 0.5]] * 3
    drawn = uniform(2, 5)(np.zeros((3, 7)))
    assert np.array_equal(drawn, uniform(2, 5)(np.zeros((3, 7)))) and len(np.unique(drawn)) == 6
