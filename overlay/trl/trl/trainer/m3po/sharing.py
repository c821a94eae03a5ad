# SPDX-License-Identifier: Apache-2.0
"""Whether a trainer reads the prompt of a group once (`shared_prefix`), and its scoring pass if it does."""

from __future__ import annotations

from typing import Any

import torch
from transformers.m3po.shared_prefix import model_obstacle, share_prefix

from .checks import method_without_record


def sharing_obstacle(trainer: Any, elsewhere: list[str]) -> str | None:
    """Why prompts cannot be shared, or why it would not be the same function; None where they can.

    Args:
        trainer: the `GRPOTrainer`, after its arguments and models are set.
        elsewhere: what moves the rollouts out of a single call of `generate`, by name.
    """
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    if elsewhere:
        return f"{elsewhere[0]} rolls out elsewhere than in one call of generate"
    kind = type(trainer)
    if kind.__name__.startswith("Unsloth") or method_without_record(kind) is not None:
        return f"{kind.__name__} scores in its own way"
    if args.n_gpu > 1:
        return "DataParallel splits rows: start one process for each GPU"
    if (why := model_obstacle(model.config)) is not None:
        return why
    rates = [part.p for part in model.modules() if isinstance(part, torch.nn.Dropout)]
    if any([*rates, getattr(model.config, "attention_dropout", 0.0)]):
        return "dropout would draw one mask for a prompt and not one for each path: set lora_dropout to 0"
    if args.per_device_train_batch_size % args.num_generations:
        return (
            f"per_device_train_batch_size={args.per_device_train_batch_size} does not hold whole groups of "
            f"num_generations={args.num_generations}"
        )
    return None


def choose_sharing(trainer: Any, elsewhere: list[str]) -> tuple[bool, str]:
    """Whether prompts are shared, and a few words on it for the first lines of a run; see `sharing_obstacle`.

    Raises:
        ValueError: `shared_prefix='true'` where they cannot be.
    """
    choice = trainer.args.shared_prefix
    if choice == "false":
        return False, "shared_prefix=false"
    why = sharing_obstacle(trainer, elsewhere)
    if why is None:
        return True, f"shared_prefix={choice}: on, a prompt is read once for its {trainer.num_generations} paths"
    if choice == "true":
        raise ValueError(f"shared_prefix='true' is not possible here: {why}. Mend that, or set it to auto.")
    return False, f"shared_prefix=auto: off, {why}"


def check_prompts(prompt_ids: torch.Tensor, num_paths: int) -> None:
    """Refuses rows that do not lie side by side by prompts: they would be scored behind another row's prompt.

    Args:
        prompt_ids: (B, P) long.
        num_paths: N.

    Raises:
        ValueError: the first row that begins with another prompt than its group is named.
    """
    differs = (prompt_ids != prompt_ids[::num_paths].repeat_interleave(num_paths, 0)).any(-1)
    if bool(differs.any()):
        row = int(differs.nonzero()[0])
        raise ValueError(
            f"row {row} of the rollout has another prompt than the other {num_paths} of its group; set "
            "shared_prefix='false'."
        )


def shared_inputs(
    model_inputs: dict[str, Any], labels: torch.Tensor, completion_length: int, num_paths: int
) -> tuple[dict[str, Any], torch.Tensor]:
    """The inputs of a scoring pass over a stream, from those of one over rows.

    Args:
        model_inputs: `input_ids` and `attention_mask` (B, P + C), and what a mode adds.
        labels: (B, P + C) long.
        completion_length: C.
        num_paths: N.

    Returns:
        The inputs, see `share_prefix`, and the labels (B, 1 + C) that go with the model's states.
    """
    stream = share_prefix(model_inputs["input_ids"], model_inputs["attention_mask"], completion_length, num_paths)
    return model_inputs | stream, labels[:, -completion_length - 1 :]
