# SPDX-License-Identifier: Apache-2.0
"""The policy: trained by SB3's PPO, resumed where it was stopped, and kept as safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from stable_baselines3 import PPO
from stable_baselines3.common.logger import configure
from stable_baselines3.common.policies import ActorCriticPolicy

from m3po_lab.controller.controls import Policy
from m3po_lab.controller.environment import Actions, GateVecEnv, Standard, observation_space
from m3po_lab.controller.gates import GateSpace
from m3po_lab.core.errors import UserError
from m3po_lab.core.files import read_json, write_json
from m3po_lab.core.identity import named_content, short_digest
from m3po_lab.core.observe import unchanged_random_state
from m3po_lab.core.saving import obey_umask
from m3po_lab.pretraining.variants import Controlled

WEIGHTS, ABOUT = "policy.safetensors", "policy.json"
RESULT = "result.json"  # of all fits of a seed
CONSTANT = "best constant"
STATE = "training.pt"  # of a training that is not done
STANDARD = "observation."  # how the tensors of `Standard` are named among the weights


@dataclass(frozen=True)
class PPOSettings:
    """The hyperparameters of PPO (Schulman et al. 2017), those of SB3 but for what one-step episodes want.

    An episode is one step, so there is nothing to discount and the critic is a baseline by context.

    Args:
        rollout_size: episodes of an update, a multiple of those that run at once.
        minibatch_size: of a gradient step.
        num_epochs: passes over the episodes of an update.
        learning_rate: of Adam.
        ent_coef: weight of the entropy; more than 0.01 widens the Gaussian where the reward is flat.
        log_std_init: of the Gaussian; at 0 most of what it draws is cut at the ends of the box.
    """

    rollout_size: int = 256
    minibatch_size: int = 64
    num_epochs: int = 10
    learning_rate: float = 1e-3
    ent_coef: float = 0.0
    log_std_init: float = -1.0


def train_policy(
    env: GateVecEnv,
    budget: int,
    seed: int,
    settings: PPOSettings,
    folder: Path,
    watch: Callable[[int, Policy, dict[str, float]], None],
) -> ActorCriticPolicy:
    """Trains for `budget` episodes, or goes on from `folder`; returns the network, see `likeliest`.

    Args:
        env: of the training split.
        budget: episodes, rounded down to whole updates.
        seed: of the weights, of what is drawn, and of the order.
        settings: of PPO.
        folder: of TensorBoard's log and of the state that a stopped training goes on from.
        watch: gets, after each update, the episodes so far, the policy, and means of the update.
    """
    with unchanged_random_state():
        algorithm = PPO(
            "MlpPolicy",
            env,
            n_steps=settings.rollout_size // env.num_envs,
            batch_size=settings.minibatch_size,
            n_epochs=settings.num_epochs,
            learning_rate=settings.learning_rate,
            ent_coef=settings.ent_coef,
            gamma=0.0,
            gae_lambda=1.0,
            policy_kwargs={"log_std_init": settings.log_std_init},
            seed=seed,
            device="cpu",
        )
        algorithm.set_logger(configure(str(folder), ["tensorboard"]))
        _restore(algorithm, env, folder / STATE)
        policy = likeliest(algorithm.policy, env.actions)
        while algorithm.num_timesteps + settings.rollout_size <= budget:
            env.rewards_seen.clear()
            algorithm.learn(settings.rollout_size, reset_num_timesteps=False)
            watch(algorithm.num_timesteps, policy, {"reward": float(np.mean(env.rewards_seen))})
            _save(algorithm, env, folder / STATE)
        algorithm.logger.close()
    (folder / STATE).unlink(missing_ok=True)
    return algorithm.policy


def likeliest(net: ActorCriticPolicy, actions: Actions) -> Policy:
    """The policy that takes the gates which the network finds most likely."""
    return lambda observations: actions.values(net.predict(observations, deterministic=True)[0])


def _save(algorithm: PPO, env: GateVecEnv, file: Path) -> None:
    """Keeps all that the next update depends on, in one file that is whole or not there."""
    arrays = np.random.get_state(legacy=False)
    arrays["state"]["key"] = arrays["state"]["key"].tolist()
    rest = {"timesteps": algorithm.num_timesteps, "env": env.state(), "numpy": arrays}
    parts = {
        "policy": algorithm.policy.state_dict(),
        "optimizer": algorithm.policy.optimizer.state_dict(),
        "torch": torch.get_rng_state(),
        "rest": json.dumps(rest),
    }
    temporary = file.with_suffix(".tmp")
    torch.save(parts, temporary)
    os.replace(temporary, file)


def _restore(algorithm: PPO, env: GateVecEnv, file: Path) -> None:
    if not file.is_file():
        return
    parts = torch.load(file, weights_only=True)
    rest = json.loads(parts["rest"])
    algorithm.policy.load_state_dict(parts["policy"])
    algorithm.policy.optimizer.load_state_dict(parts["optimizer"])
    algorithm.num_timesteps = rest["timesteps"]
    env.set_state(rest["env"])
    rest["numpy"]["state"]["key"] = np.array(rest["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state(rest["numpy"])
    torch.set_rng_state(parts["torch"])


@dataclass(frozen=True)
class GatePolicy:
    """A trained controller: what sees a question's embedding and sets its gates.

    Args:
        net: the network.
        actions: what its actions mean.
        space: what the gates are.
        standard: makes its observations.
    """

    net: ActorCriticPolicy
    actions: Actions
    space: GateSpace
    standard: Standard

    def __call__(self, embeddings: np.ndarray) -> torch.Tensor:
        """`mhc_gate` of rows with these embeddings, see `GateSpace.as_routing_gates`."""
        policy = likeliest(self.net, self.actions)
        return self.space.as_routing_gates(policy(self.standard(embeddings)))

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Writes the two files.

        Args:
            folder: exists.
            about: what else is to be known of it, as JSON values.
        """
        weights = {name: value.numpy() for name, value in self.net.state_dict().items()}
        standard = {f"{STANDARD}mean": self.standard.mean, f"{STANDARD}scale": self.standard.scale}
        save_file({**weights, **standard}, folder / WEIGHTS)
        obey_umask(folder)
        shape = {"gates": self.space.kind, "layers": self.space.layers, "grid": self.actions.grid}
        write_json(folder / ABOUT, {**shape, **about})

    @classmethod
    def load(cls, folder: Path) -> tuple[GatePolicy, dict[str, Any]]:
        """A saved policy, and what is to be known of it.

        Raises:
            UserError: the folder has none.
        """
        about = read_json(folder / ABOUT)
        if about is None or not (folder / WEIGHTS).is_file():
            raise UserError(
                f"{folder} has no policy: give a folder like runs/controller_arithmetic/layer-seed0, which "
                "scripts/train_controller.sh wrote."
            )
        weights = load_file(folder / WEIGHTS)
        standard = Standard(weights.pop(f"{STANDARD}mean"), weights.pop(f"{STANDARD}scale"))
        space = GateSpace(about["gates"], about["layers"])
        actions = Actions(space.size, about["grid"])
        net = ActorCriticPolicy(observation_space(standard.mean[None]), actions.space, lambda progress: 0.0)
        net.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
        return cls(net, actions, space, standard), about


def load_controller(folder: Path) -> Controlled:
    """A saved policy as an evaluation takes it, with the constant gates that it is compared with.

    Raises:
        UserError: the folder has none.
    """
    policy, about = GatePolicy.load(folder)
    constants = {"gate 0": 0.0}
    result = read_json(folder / RESULT) or {"fits": {}}
    if CONSTANT in result["fits"]:
        constants[CONSTANT] = result["fits"][CONSTANT]["gates"][0][0]
    return Controlled(policy, short_digest(named_content(str(folder / WEIGHTS))), about["weights"], constants)
