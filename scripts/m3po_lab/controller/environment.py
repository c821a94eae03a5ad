# SPDX-License-Identifier: Apache-2.0
"""One problem an episode, one step: a gymnasium environment, and SB3's vector environment that does many at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from m3po_lab.controller.episodes import Episodes
from m3po_lab.controller.gates import from_actions


@dataclass(frozen=True)
class Standard:
    """Makes observations of embeddings: mean 0 and standard deviation 1 in each component of the training split.

    Args:
        mean: (H) float32.
        scale: (H) float32, above 0.
    """

    mean: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, embeddings: np.ndarray) -> Standard:
        """Of the training split, (n, H)."""
        return cls(embeddings.mean(0), embeddings.std(0) + np.float32(1e-6))

    def __call__(self, embeddings: np.ndarray) -> np.ndarray:
        """(m, H) float32."""
        return ((embeddings - self.mean) / self.scale).astype(np.float32)


class Actions:
    """What actions mean: gates in [-1, 1]^d, or with a grid one of so many equal gates.

    Args:
        size: d.
        grid: number of values of a discrete action, 0 and 1 among them; None is the box. With several gates each has
            its own.
    """

    def __init__(self, size: int, grid: int | None = None) -> None:
        self.size, self.grid = size, grid
        self.space: spaces.Space[Any] = (
            spaces.Box(-1.0, 1.0, (size,), np.float32)
            if grid is None
            else spaces.Discrete(grid)
            if size == 1
            else spaces.MultiDiscrete([grid] * size)
        )

    def values(self, actions: Any) -> np.ndarray:
        """(B, d) in [0, 1] of B actions."""
        actions = np.asarray(actions)
        if self.grid is None:
            return from_actions(actions.reshape(-1, self.size))
        return actions.reshape(-1, self.size) / (self.grid - 1)


def observation_space(embeddings: np.ndarray) -> spaces.Box:
    """Of standardised embeddings (n, H)."""
    return spaces.Box(-np.inf, np.inf, embeddings.shape[1:], np.float32)


class GSM8KMHCEnv(gymnasium.Env[np.ndarray, Any]):
    """One (problem, gate) pair an episode.

    Args:
        episodes: the problems with their model.
        observations: (n, H) float32, what is seen of each problem, see `Standard`.
        reward: see `Episodes.rewards`.
        grid: see `Actions`.
    """

    metadata: dict[str, Any] = {"render_modes": []}

    def __init__(
        self, episodes: Episodes, observations: np.ndarray, reward: str = "dense", grid: int | None = None
    ) -> None:
        self.episodes, self.observations, self.reward = episodes, observations, reward
        self.actions = Actions(episodes.space.size, grid)
        self.action_space = self.actions.space
        self.observation_space = observation_space(observations)
        self._problem = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Draws a problem, or takes `options["problem"]`."""
        super().reset(seed=seed)
        drawn = int(self.np_random.integers(len(self.observations)))
        self._problem = int((options or {}).get("problem", drawn))
        return self.observations[self._problem].copy(), {"problem": self._problem}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Sets the gate; the episode ends."""
        values = self.actions.values([action])
        found = self.episodes.rewards(np.array([self._problem]), values, self.reward)
        info = {"problem": self._problem, "gate": values[0], **{name: float(part[0]) for name, part in found.items()}}
        return self.observations[self._problem].copy(), float(found["reward"][0]), True, False, info


class GateVecEnv(VecEnv):
    """`num_envs` episodes of `GSM8KMHCEnv` at once, in one batched forward or generation.

    The problems come in shuffled passes over the split, from a generator of the environment's own; `state` and
    `set_state` are what a stopped training goes on with: the `reset` behind it begins where `state` was taken.

    Args:
        episodes: the problems with their model.
        observations: (n, H) float32, see `Standard`.
        num_envs: rows.
        reward: see `Episodes.rewards`.
        grid: see `Actions`.
        seed: of the order of the problems.
        unit: what a reward is divided by; its parts in the infos are not.
    """

    def __init__(
        self,
        episodes: Episodes,
        observations: np.ndarray,
        num_envs: int,
        reward: str = "dense",
        grid: int | None = None,
        seed: int = 0,
        unit: float = 1.0,
    ) -> None:
        self.episodes, self.observations, self.reward, self.unit = episodes, observations, reward, unit
        self.actions = Actions(episodes.space.size, grid)
        super().__init__(num_envs, observation_space(observations), self.actions.space)
        self._random = np.random.default_rng(seed)
        self._order: list[int] = []
        self._problems = np.zeros(num_envs, dtype=int)
        self._values = np.zeros((num_envs, episodes.space.size))
        self._goes_on = False
        self.rewards_seen: list[float] = []  # of all episodes, for whoever clears it

    def _next(self) -> np.ndarray:
        while len(self._order) < self.num_envs:
            self._order += self._random.permutation(len(self.observations)).tolist()
        taken, self._order = self._order[: self.num_envs], self._order[self.num_envs :]
        return np.array(taken)

    def reset(self) -> np.ndarray:
        """The first problems, or those at which a stopped training goes on."""
        if not self._goes_on:
            self._problems = self._next()
        self._goes_on = False
        return self.observations[self._problems]

    def step_async(self, actions: np.ndarray) -> None:
        """Remembers the gates."""
        self._values = self.actions.values(actions)

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """All rewards; every episode ends and another one begins."""
        found = self.episodes.rewards(self._problems, self._values, self.reward)
        seen, problems = self.observations[self._problems], self._problems
        infos = [
            {
                "problem": int(problems[row]),
                "gate": self._values[row],
                "terminal_observation": seen[row],
                "TimeLimit.truncated": False,
                **{name: float(part[row]) for name, part in found.items()},
            }
            for row in range(self.num_envs)
        ]
        self._problems = self._next()
        self.rewards_seen += found["reward"].tolist()
        rewards = (found["reward"] / self.unit).astype(np.float32)
        return self.observations[self._problems], rewards, np.ones(self.num_envs, dtype=bool), infos

    def state(self) -> dict[str, Any]:
        """What the next episodes depend on."""
        return {
            "random": self._random.bit_generator.state,
            "order": list(self._order),
            "problems": self._problems.tolist(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken."""
        self._random.bit_generator.state = state["random"]
        self._order, self._problems = list(state["order"]), np.array(state["problems"])
        self._goes_on = True

    def close(self) -> None:
        """There is nothing to close."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """One for each environment."""
        return [getattr(self, attr_name, None)] * len(self._indices(indices))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """For all of them."""
        setattr(self, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """There are none."""
        raise AttributeError(method_name)

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """None is."""
        return [False] * len(self._indices(indices))

    def _indices(self, indices: Any) -> Sequence[int]:
        return range(self.num_envs) if indices is None else [indices] if isinstance(indices, int) else indices
