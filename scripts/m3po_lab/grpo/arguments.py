# SPDX-License-Identifier: Apache-2.0
"""The arguments of a run of GRPO: our few flags next to TRL's `GRPOConfig` and `ModelConfig`."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import GRPOConfig, ModelConfig

from m3po_lab.grpo.engine import Engine
from m3po_lab.problems.arguments import ProblemArguments


@dataclass
class RunArguments(ProblemArguments):
    """What a run needs beyond TRL's `GRPOConfig` and `ModelConfig`: the problems, the prompt and what trains."""

    engine: str = field(
        default="auto",
        metadata={
            "help": "What trains: 'trl', 'unsloth' (needs an NVIDIA GPU and the extra unsloth of the environment), or "
            "'auto', which takes Unsloth for LoRA where it can run and else TRL. docs/engines.md has what each can do."
        },
    )
    num_eval_paths: int = field(
        default=0,
        metadata={
            "help": "After training, sample so many plain completions of each of the first num_sampled_problems "
            "held-out problems too, for pass@k and the majority vote; 0: none."
        },
    )
    num_sampled_problems: int = field(
        default=64, metadata={"help": "Held-out problems of which num_eval_paths completions are sampled."}
    )
    study: str | None = field(
        default=None,
        metadata={"help": "Digest of the study that the run belongs to; scripts/run_experiment.sh sets it."},
    )
    overwrite: bool = field(
        default=False,
        metadata={"help": "Start anew in a run folder that has checkpoints; they and the old report are deleted."},
    )


@dataclass
class Run:
    """One parsed command: the three argument groups, where the YAML came from, and what will train."""

    script: RunArguments
    training: GRPOConfig
    model: ModelConfig
    config_file: Path
    engine: Engine

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.training.output_dir)

    @property
    def groups(self) -> tuple[RunArguments, GRPOConfig, ModelConfig]:
        """All arguments."""
        return self.script, self.training, self.model


def changed_values(run: Run) -> dict[str, Any]:
    """Every argument that differs from its default, for `summary.json`; the run folder is where that lies."""
    changed = {}
    for group in run.groups:
        for spec in dataclasses.fields(group):
            value = getattr(group, spec.name)
            default = spec.default_factory() if spec.default_factory is not dataclasses.MISSING else spec.default
            is_set = spec.init and value != default and spec.name != "output_dir"
            if is_set and isinstance(value, bool | int | float | str | list | dict):
                changed[spec.name] = value
    return changed
