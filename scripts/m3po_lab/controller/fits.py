# SPDX-License-Identifier: Apache-2.0
"""One seed of one kind of gates: the controller and its controls, fitted on the training split, tried on the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from m3po_lab.controller.arguments import ControllerArguments
from m3po_lab.controller.controls import LinUCB, Policy, Training, best_by_search, best_on_grid, uniform
from m3po_lab.controller.effects import worth
from m3po_lab.controller.environment import Actions, GateVecEnv, Standard
from m3po_lab.controller.episodes import Episodes
from m3po_lab.controller.policy import CONSTANT, RESULT, GatePolicy, likeliest, train_policy
from m3po_lab.core.files import read_json, write_json

PPO, BANDIT, SEARCH, RANDOM = "ppo", "bandit", "best vector", "random"
CURVE_POINTS = 8  # of the curve of the policy on the test split


@dataclass(frozen=True)
class Splits:
    """The two splits with one kind of gates.

    Args:
        train: problems to fit on.
        test: problems to report on.
        standard: of the training split.
        observations: (n, H), of the training split.
        test_observations: of the test split.
        weights: the digest of the model's files.
    """

    train: Episodes
    test: Episodes
    standard: Standard
    observations: np.ndarray
    test_observations: np.ndarray
    weights: str


def names_of_fits(kind: str) -> list[str]:
    """In the order in which they are done; a single gate needs no search for a vector."""
    return [PPO, BANDIT, CONSTANT, *([] if kind == "global" else [SEARCH]), RANDOM]


def fit_seed(splits: Splits, script: ControllerArguments, seed: int, folder: Path) -> dict[str, Any]:
    """Fits what is not fitted yet, and keeps each result; returns all of them.

    Returns:
        fits: by name `gates` (n, d) on the test split, `spent`, the pairs evaluated, and see `worth`.
        curve: of PPO: `spent`, `reward`, the mean of an update, and at some points `test`, the mean reward there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    result = read_json(folder / RESULT) or {"seed": seed, "gates": splits.train.space.kind, "fits": {}, "curve": []}
    for name in names_of_fits(result["gates"]):
        if name in result["fits"]:
            continue
        counted = Counted(splits.train, script.reward, script.budget, f"{result['gates']}, seed {seed}: {name}")
        with counted.bar:
            policy = _fit(name, splits, script, seed, folder, counted, result)
        values = policy(splits.test_observations)
        found = worth(splits.test, values)
        result["fits"][name] = {"spent": counted.spent, "gates": np.asarray(values).tolist(), **found}
        write_json(folder / RESULT, result)
    return result


class Counted:
    """Rewards of the training split, with a progress bar over the pairs that are evaluated."""

    def __init__(self, episodes: Episodes, reward: str, budget: int, label: str) -> None:
        self.episodes, self.reward, self.spent = episodes, reward, 0
        self.bar = tqdm(total=budget, desc=label, unit="pair", mininterval=1.0)

    def __call__(self, indices: np.ndarray, values: np.ndarray) -> np.ndarray:
        """(B,) rewards of pairs."""
        found = self.episodes.rewards(indices, values, self.reward)["reward"]
        self.count(len(indices))
        return found

    def count(self, pairs: int) -> None:
        """So many more."""
        self.spent += pairs
        self.bar.update(pairs)


def _fit(
    name: str,
    splits: Splits,
    script: ControllerArguments,
    seed: int,
    folder: Path,
    counted: Counted,
    result: dict[str, Any],
) -> Policy:
    size = splits.train.space.size
    if name == PPO:
        return _fit_ppo(splits, script, seed, folder, counted, result)
    if name == RANDOM:
        return uniform(size, seed)
    training = Training(counted, splits.observations, size, script.budget, seed)
    fits: dict[str, Callable[[], Policy]] = {
        BANDIT: lambda: LinUCB(training, script.control_grid),
        CONSTANT: lambda: best_on_grid(training, script.control_grid),
        SEARCH: lambda: best_by_search(training),
    }
    return fits[name]()


def _fit_ppo(
    splits: Splits, script: ControllerArguments, seed: int, folder: Path, counted: Counted, result: dict[str, Any]
) -> Policy:
    """PPO on rewards in units of their spread under random gates, which are a rollout's worth of its budget."""
    random, size = np.random.default_rng(seed), splits.train.space.size
    tried = min(script.rollout_size, len(splits.observations))
    problems = random.choice(len(splits.observations), tried, replace=False)
    unit = float(counted(problems, random.random((tried, size))).std()) or 1.0
    env = GateVecEnv(splits.train, splits.observations, script.num_envs, script.reward, script.action_grid, seed, unit)
    updates = (script.budget - tried) // script.rollout_size
    shown = {round(updates * (point + 1) / CURVE_POINTS) for point in range(CURVE_POINTS)}

    def watch(spent: int, policy: Policy, means: dict[str, float]) -> None:
        counted.count(spent + tried - counted.spent)
        row = {"spent": counted.spent, **means}
        if spent // script.rollout_size in shown:
            values, everything = policy(splits.test_observations), np.arange(len(splits.test.problems))
            row["test"] = float(splits.test.rewards(everything, values, script.reward)["reward"].mean())
        result["curve"] = [*(one for one in result["curve"] if one["spent"] < counted.spent), row]
        write_json(folder / RESULT, result)

    net = train_policy(env, script.budget - tried, seed, script.ppo, folder, watch)
    about = {"seed": seed, "reward": script.reward, "budget": script.budget, "weights": splits.weights}
    actions = Actions(size, script.action_grid)
    GatePolicy(net, actions, splits.train.space, splits.standard).save(folder, about)
    return likeliest(net, actions)
