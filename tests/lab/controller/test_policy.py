# SPDX-License-Identifier: Apache-2.0
"""PPO on a stand-in whose best gates are known: it finds them, goes on where it was killed, and is kept whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from m3po_lab.controller.controls import LinUCB, Training, uniform
from m3po_lab.controller.effects import preflight, worth
from m3po_lab.controller.environment import GateVecEnv, Standard
from m3po_lab.controller.episodes import Episodes
from m3po_lab.controller.policy import STATE, GatePolicy, PPOSettings, likeliest, train_policy
from m3po_lab.core.errors import UserError

from .synthetic import best_gates, synthetic_episodes

BANDIT_PAIRS = 500
PPO_PAIRS = 3072  # docs/controller.md has this number
SEEDS = range(5)


def seen(episodes: Episodes) -> np.ndarray:
    found = episodes.embeddings()
    return Standard.of(found)(found)


def trained(
    episodes: Episodes, folder: Path, budget: int, seed: int = 0, watch: Any = None, grid: int | None = None
) -> Any:
    folder.mkdir(exist_ok=True)
    unit = float(episodes.rewards(np.arange(64), np.random.default_rng(0).random((64, episodes.space.size)), "dense")[
        "reward"
    ].std()) or 1.0  # fmt: skip
    env = GateVecEnv(episodes, seen(episodes), 64, seed=seed, unit=unit, grid=grid)
    return train_policy(env, budget, seed, PPOSettings(), folder, watch or (lambda spent, policy, means: None)), env


@pytest.mark.parametrize("seed", SEEDS)
def test_the_bandit_finds_the_best_gate_of_each_context(seed: int):
    episodes = synthetic_episodes()
    spent = 0

    def evaluate(indices: np.ndarray, values: np.ndarray) -> np.ndarray:
        nonlocal spent
        spent += len(indices)
        return episodes.rewards(indices, values, "dense")["reward"]

    bandit = LinUCB(Training(evaluate, seen(episodes), 1, BANDIT_PAIRS, seed), 11)
    missed = np.abs(bandit(seen(episodes))[:, 0] - best_gates(episodes))
    assert spent <= BANDIT_PAIRS and missed.mean() <= 0.1


@pytest.mark.parametrize(
    ("seed", "kind", "grid"), [*((seed, "global", None) for seed in SEEDS), (0, "layer", None), (0, "global", 11)]
)
def test_ppo_finds_the_best_gate_of_each_context(seed: int, kind: str, grid: int | None, tmp_path: Path):
    episodes = synthetic_episodes(kind)
    net, env = trained(episodes, tmp_path / "run", PPO_PAIRS, seed, grid=grid)
    chosen = likeliest(net, env.actions)(seen(episodes))
    missed = np.abs(chosen - np.array(best_gates(episodes))[:, None])
    assert missed.mean() <= 0.1
    assert worth(episodes, chosen)["correct"].count(False) <= 3


def test_a_gate_that_is_disconnected_is_seen_and_is_worth_nothing(tmp_path: Path):
    episodes = synthetic_episodes(connected=False)
    with pytest.raises(UserError, match="The routing gate does nothing here: 0.0e"):
        preflight(episodes)
    assert preflight(synthetic_episodes()) > 0.1
    net, env = trained(episodes, tmp_path / "run", 1024)
    policies: list[Callable[[np.ndarray], np.ndarray]] = [likeliest(net, env.actions), uniform(1, 0)]
    gains = [np.mean(worth(episodes, policy(seen(episodes)))["dense"]) for policy in policies]
    assert gains == [0.0, 0.0]


class Killed(Exception):
    """As a signal would."""


@pytest.mark.parametrize("at", [256, 768])
def test_a_killed_training_ends_with_the_same_policy(at: int, tmp_path: Path):
    episodes = synthetic_episodes("layer")
    whole, _ = trained(episodes, tmp_path / "whole", 1024)
    steps: list[int] = []

    def kill(spent: int, policy: Any, means: dict[str, float]) -> None:
        if spent > at:  # this update is lost: it has not been kept
            raise Killed
        steps.append(spent)

    with pytest.raises(Killed):
        trained(episodes, tmp_path / "killed", 1024, watch=kill)
    assert steps[-1] == at and (tmp_path / "killed" / STATE).is_file()
    torch.rand(3), np.random.rand(3)  # another process has other generators
    resumed, _ = trained(episodes, tmp_path / "killed", 1024, watch=lambda spent, policy, means: steps.append(spent))
    assert steps == [256, 512, 768, 1024], "it goes on, and does not begin again"
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())
    assert not (tmp_path / "killed" / STATE).exists()
    other, _ = trained(episodes, tmp_path / "other", 1024, seed=1)
    assert not torch.equal(other.state_dict()["action_net.weight"], whole.state_dict()["action_net.weight"])


@pytest.mark.parametrize("grid", [None, 5])
def test_a_policy_is_kept_whole(grid: int | None, tmp_path: Path):
    episodes = synthetic_episodes("layer")
    embeddings = episodes.embeddings()
    net, env = trained(episodes, tmp_path / "run", 512, grid=grid)
    policy = GatePolicy(net, env.actions, episodes.space, Standard.of(embeddings))
    policy.save(tmp_path, {"seed": 3})
    loaded, about = GatePolicy.load(tmp_path)
    gates = loaded(embeddings)
    assert torch.equal(gates, policy(embeddings)) and gates.shape == (64, 3, 1)
    assert about["seed"] == 3 and gates.std(0).max() > 0
    with pytest.raises(UserError, match="has no policy: give a folder like"):
        GatePolicy.load(tmp_path / "run")
