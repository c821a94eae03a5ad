# SPDX-License-Identifier: Apache-2.0
"""The arguments of a controller's training, and whether a folder has the training that they define."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from m3po_lab.command_line.parser import OneLineParser, check_unknown, one_line_errors
from m3po_lab.controller.episodes import REWARDS
from m3po_lab.controller.gates import KINDS
from m3po_lab.controller.policy import PPOSettings
from m3po_lab.core.config_files import OF_CONTROLLER, find_config, split_config
from m3po_lab.core.errors import PROJECT_ROOT, UserError
from m3po_lab.core.files import read_json, shown_path
from m3po_lab.core.identity import RUN_FILE, defining, difference, named_content
from m3po_lab.evaluation.folder import weights_of
from m3po_lab.problems.arguments import DataArguments

DEFAULT_CONTROLLER_CONFIG = "configs/controller_arithmetic.yaml"
EXTENDED = ("gates", "seeds")  # a folder may get more of them later


@dataclass
class ControllerArguments(DataArguments):
    """The problems, what a controller sets and is rewarded for, and how much it may try."""

    dataset: str = field(
        default="reasoning-gym:basic_arithmetic",
        metadata={
            "help": "Problems, as of a training: 'reasoning-gym:<task>', a .jsonl in GSM8K's format, 'openai/gsm8k'."
        },
    )
    num_train_problems: int = field(default=2000, metadata={"help": "Problems that controllers are fitted on."})
    gates: list[str] = field(
        default_factory=lambda: ["global", "layer"],
        metadata={"help": "What is set, each kind for itself: 'global', 'layer', 'sublayer'."},
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2, 3, 4], metadata={"help": "Every controller is fitted once for each seed."}
    )
    reward: str = field(
        default="dense",
        metadata={
            "help": "'dense': log-prob of the reference answer minus that under gate 1, per token; 'exact': 1 if the "
            "greedy answer is right; 'mix': their sum."
        },
    )
    budget: int = field(default=8192, metadata={"help": "(problem, gate) pairs that each fit may evaluate."})
    control_grid: int = field(default=11, metadata={"help": "Gates from 0 to 1 that the controls choose from."})
    action_grid: int | None = field(
        default=None, metadata={"help": "Actions of PPO are so many equal steps from 0 to 1; unset, any gate."}
    )
    num_envs: int = field(default=64, metadata={"help": "Episodes at once."})
    rollout_size: int = field(default=256, metadata={"help": "Episodes of an update of PPO."})
    minibatch_size: int = field(default=64, metadata={"help": "Episodes of a gradient step of PPO."})
    num_epochs: int = field(default=10, metadata={"help": "Passes of PPO over the episodes of an update."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Of PPO."})
    ent_coef: float = field(default=0.0, metadata={"help": "Weight of the entropy of PPO's policy."})
    log_std_init: float = field(default=-1.0, metadata={"help": "Logarithm of the policy's spread at the start."})
    max_new_tokens: int = field(default=8, metadata={"help": "Length of an answer at most."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder of the results (default: runs/<config>)."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, values, known in (("gates", self.gates, KINDS), ("reward", [self.reward], REWARDS)):
            for value in values:
                if value not in known:
                    raise UserError(f"--{name} {value} is unknown; give {' or '.join(known)}.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"--seeds {self.seeds}: give different ones.")
        if self.rollout_size % self.num_envs:
            raise UserError(f"--rollout_size {self.rollout_size}: it must be a multiple of num_envs = {self.num_envs}.")
        if self.budget < 2 * self.rollout_size:
            raise UserError(f"--budget {self.budget}: it must be at least two rollouts of {self.rollout_size}.")
        for name, least in (("control_grid", self.control_grid), ("action_grid", self.action_grid)):
            if least is not None and least < 2:
                raise UserError(f"--{name} {least}: it must be at least 2, for the gates 0 and 1.")

    @property
    def ppo(self) -> PPOSettings:
        """Those of PPO."""
        return PPOSettings(**{entry.name: getattr(self, entry.name) for entry in fields(PPOSettings)})


@dataclass(frozen=True)
class ControllerRun:
    """One parsed command.

    Args:
        checkpoint: a model folder.
        script: the arguments.
        folder: of the results.
    """

    checkpoint: str
    script: ControllerArguments
    folder: Path

    def flags(self) -> dict[str, Any]:
        """What defines the results, by name."""
        values = {entry.name: getattr(self.script, entry.name) for entry in fields(self.script)}
        flags = {name: value for name, value in defining(values).items() if name not in EXTENDED}
        flags["dataset"] = named_content(self.script.dataset)
        return {**flags, "checkpoint": weights_of(self.checkpoint)["weights"]}


def parse(words: list[str]) -> ControllerRun:
    """Read ``CHECKPOINT [X.yaml] [--flag value ...]``.

    Raises:
        UserError: for anything that cannot be read or is unknown.
    """
    if not words or words[0].startswith("-") or words[0].endswith(".yaml"):
        raise UserError(
            "Give a checkpoint first: bash scripts/train_controller.sh runs/mhc_arithmetic/mhc-seed0/final "
            "[config.yaml] [--flag value ...]."
        )
    config_name, rest = split_config(words[1:])
    file = find_config(config_name or DEFAULT_CONTROLLER_CONFIG, begins=OF_CONTROLLER)
    parser = OneLineParser(ControllerArguments)
    with one_line_errors(file):
        script, *_, in_yaml, unknown = parser.parse_args_and_config(
            ["--config", str(file), *rest], return_remaining_strings=True, separate_remaining_strings=True
        )
    check_unknown(parser, in_yaml, unknown, file)
    folder = Path(script.output_dir) if script.output_dir else PROJECT_ROOT / "runs" / file.stem
    return ControllerRun(words[0], script, folder.resolve())


def check_folder(run: ControllerRun) -> None:
    """Refuse a folder with the results of another command.

    Raises:
        UserError: it names the first flag that differs, with both values.
    """
    stored = read_json(run.folder / RUN_FILE)
    differing = difference(stored["flags"], run.flags()) if stored else None
    if differing is not None:
        name, before, now = differing
        raise UserError(
            f"--{name} {now}: {shown_path(run.folder)} has results with {before}; set that, or give another "
            "--output_dir."
        )
