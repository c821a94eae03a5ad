# SPDX-License-Identifier: Apache-2.0
"""Weights are saved with the permissions of any other file: safetensors writes them for their owner alone."""

import os
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def obey_umask(folder: Path) -> None:
    """Give the weights in `folder` the permissions that the umask leaves to new files."""
    mask = os.umask(0o077)  # it can only be read by setting it
    os.umask(mask)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o666 & ~mask)


class ObeyUmask(TrainerCallback):
    """`obey_umask` for every checkpoint."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.should_save:
            obey_umask(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def save_model(trainer: Trainer, folder: Path) -> None:
    """Save the trained model; all processes of a run call it together."""
    trainer.save_model(str(folder))
    if trainer.args.should_save:
        obey_umask(folder)
