# SPDX-License-Identifier: Apache-2.0
"""What a controller has to beat: gates that do not look at the problem, and simpler ways to look at it.

Each is fitted on the training split with the same budget of evaluations, (problem, gate) pairs, and gives gates for
problems that it has not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cma
import numpy as np

Evaluate = Callable[[np.ndarray, np.ndarray], np.ndarray]  # indices (B,), values (B, d) -> rewards (B,)
Policy = Callable[[np.ndarray], np.ndarray]  # observations (n, H) -> values (n, d)
MINIBATCH = 32  # problems that a candidate of a search is tried on
COMPONENTS = 8  # of the observations that a linear bandit sees


@dataclass(frozen=True)
class Training:
    """The training split as a fit sees it.

    Args:
        evaluate: the reward of pairs.
        observations: (n, H), standardised.
        size: d.
        budget: pairs that may be evaluated.
        seed: of all draws.
    """

    evaluate: Evaluate
    observations: np.ndarray
    size: int
    budget: int
    seed: int

    @property
    def random(self) -> np.random.Generator:
        """A fresh generator."""
        return np.random.default_rng(self.seed)

    @property
    def number(self) -> int:
        """n."""
        return len(self.observations)


def constant(values: np.ndarray) -> Policy:
    """The same gate for every problem: values (d,)."""
    return lambda observations: np.tile(values, (len(observations), 1))


def uniform(size: int, seed: int) -> Policy:
    """A gate drawn for every problem."""
    return lambda observations: np.random.default_rng(seed).random((len(observations), size))


def grid_of(number: int) -> np.ndarray:
    """Evenly spaced gates from 0 to 1."""
    return np.linspace(0.0, 1.0, number)


def best_on_grid(training: Training, number: int) -> Policy:
    """The best constant gate of a grid, the same in every layer, each tried on the same problems."""
    each = min(training.number, training.budget // number)
    problems = training.random.choice(training.number, each, replace=False)
    rewards = [training.evaluate(problems, np.full((each, training.size), gate)).mean() for gate in grid_of(number)]
    return constant(np.full(training.size, grid_of(number)[int(np.argmax(rewards))]))


def best_by_search(training: Training) -> Policy:
    """The best constant vector of gates by CMA-ES, every generation on fresh problems that its candidates share.

    Raises:
        ValueError: there is one gate only, for which there is a grid.
    """
    if training.size == 1:
        raise ValueError("CMA-ES needs two gates or more; for one there is the grid.")
    random, left = training.random, training.budget
    options = {"bounds": [0.0, 1.0], "seed": training.seed + 1, "verbose": -9, "CMA_stds": [1.0] * training.size}
    search = cma.CMAEvolutionStrategy(np.full(training.size, 0.75), 0.25, options)
    each = min(MINIBATCH, training.number)
    while left >= search.popsize * each:
        candidates = np.array(search.ask())
        problems = random.choice(training.number, each, replace=False)
        rewards = training.evaluate(np.tile(problems, len(candidates)), np.repeat(candidates, each, axis=0))
        search.tell(list(candidates), list(-rewards.reshape(len(candidates), each).mean(1)))
        left -= len(candidates) * each
    return constant(np.clip(search.result.xfavorite, 0.0, 1.0))


class LinUCB:
    """A contextual bandit over a grid of gates, the same in every layer (Li et al. 2010, algorithm 1).

    Each gate has a ridge regression of the reward on the first principal components of the observations; the gate with
    the highest upper bound is tried. Rewards are scaled by their spread in the first batch, so that `width` is in its
    units.
    """

    def __init__(self, training: Training, number: int, width: float = 1.0, batch: int = 64) -> None:
        self.size, self.gates = training.size, grid_of(number)
        centred = training.observations - training.observations.mean(0)
        _, _, axes = np.linalg.svd(centred, full_matrices=False)
        self._mean, self._axes = training.observations.mean(0), axes[:COMPONENTS]
        self._scale = (centred @ self._axes.T).std(0) + 1e-9
        features = self._features(training.observations)
        width_of = features.shape[1]
        self._inverse = np.tile(np.eye(width_of), (number, 1, 1))
        self._moments = np.zeros((number, width_of))
        random, left, unit = training.random, training.budget, None
        while left > 0:
            problems = random.choice(training.number, min(batch, left, training.number), replace=False)
            seen = features[problems]
            bounds = self._expected(seen) + width * np.sqrt(np.einsum("bf,kfg,bg->bk", seen, self._inverse, seen))
            # Gates that are equal so far are tried alike.
            arms = np.argmax(bounds + 1e-9 * random.random(bounds.shape), axis=1)
            rewards = training.evaluate(problems, np.repeat(self.gates[arms][:, None], self.size, axis=1))
            unit = rewards.std() + 1e-9 if unit is None else unit
            for row, arm in enumerate(arms):
                self._learn(int(arm), seen[row], rewards[row] / unit)
            left -= len(problems)

    def __call__(self, observations: np.ndarray) -> np.ndarray:
        """The gates with the highest expected reward: (n, d)."""
        arms = np.argmax(self._expected(self._features(observations)), axis=1)
        return np.repeat(self.gates[arms][:, None], self.size, axis=1)

    def _features(self, observations: np.ndarray) -> np.ndarray:
        components = (observations - self._mean) @ self._axes.T / self._scale
        return np.concatenate([components, np.ones((len(observations), 1))], axis=1)

    def _expected(self, features: np.ndarray) -> np.ndarray:
        return np.einsum("bf,kfg,kg->bk", features, self._inverse, self._moments)

    def _learn(self, arm: int, seen: np.ndarray, reward: float) -> None:
        """One more reward of a gate; the inverse is kept by Sherman and Morrison."""
        product = self._inverse[arm] @ seen
        self._inverse[arm] -= np.outer(product, product) / (1.0 + seen @ product)
        self._moments[arm] += reward * seen


def oracle(evaluate: Evaluate, number_of_problems: int, size: int, number: int) -> np.ndarray:
    """The best gate of the grid for each problem, by its own reward: (n, d), the ceiling of what looks at a grid."""
    indices = np.arange(number_of_problems)
    rewards = np.array([evaluate(indices, np.full((len(indices), size), gate)) for gate in grid_of(number)])
    return np.repeat(grid_of(number)[rewards.argmax(0)][:, None], size, axis=1)
