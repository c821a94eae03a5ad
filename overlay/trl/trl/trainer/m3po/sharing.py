# SPDX-License-Identifier: Apache-2.0
"""Whether a trainer reads the prompt of a group once (`shared_prefix`), and its scoring pass if it does."""

from __future__ import annotations

from typing import Any

import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.m3po.shared_prefix import model_obstacle, share_prefix

from .checks import generation_of, has_dropout, method_without_record

# Logits processors that look at the scores alone.
_OF_SCORES = (MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)


def sharing_obstacle(trainer: Any, elsewhere: list[str]) -> str | None:
    """Why prompts cannot be shared, or why it would not be the same function; None where they can.

    Args:
        trainer: the `GRPOTrainer`, after its arguments and models are set.
        elsewhere: what moves the rollouts out of a single call of `generate`, by name.
    """
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    kind = type(trainer)
    if elsewhere:
        return f"{elsewhere[0]} rolls out elsewhere than in one call of generate"
    if kind.__name__.startswith("Unsloth") or method_without_record(kind) is not None:
        return f"{kind.__name__} scores in its own way"
    if kind._prepare_inputs.__qualname__ != "GRPOTrainer._prepare_inputs":
        return f"{kind.__name__} splits rollouts in its own way"
    if args.n_gpu > 1:
        return "DataParallel splits rows: start one process for each GPU"
    if args.per_device_train_batch_size % args.num_generations:
        return (
            f"per_device_train_batch_size={args.per_device_train_batch_size} does not hold whole groups of "
            f"num_generations={args.num_generations}"
        )
    reference = getattr(trainer, "ref_model", None)
    models = [model, *([] if reference is None else [trainer.accelerator.unwrap_model(reference)])]
    reasons = [why for each in models if (why := model_obstacle(each.config)) is not None]
    return next(iter(reasons), None) or _noise(args, model) or _adapter(model) or _generation(trainer, model)


def _noise(args: Any, model: Any) -> str | None:
    """What draws numbers in a forward: one for a prompt where it was one for each path."""
    if has_dropout(model):
        return "dropout would draw one mask for a prompt and not one for each path: set lora_dropout to 0"
    return "neftune_noise_alpha adds noise to every row" if args.neftune_noise_alpha else None


def _adapter(model: Any) -> str | None:
    """Adapters that look at whole rows."""
    for config in getattr(model, "peft_config", {}).values():
        if config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None):
            return f"the adapter ({config.peft_type}) reads whole rows"
    return None


def _generation(trainer: Any, model: Any) -> str | None:
    """What `generate` would do otherwise from a cache that it is given, or to a prompt with a gap in it."""
    if trainer.use_vllm:
        return None  # the scoring passes alone share prompts; its engine has a cache of its own
    config, processors = generation_of(trainer, model)
    for name in ("cache_implementation", "prefill_chunk_size"):
        if getattr(config, name, None) is not None:
            return f"{name}={getattr(config, name)!r} wants a cache of generate's own"
    if config.use_cache is False:
        return "use_cache=False reads every prompt again in every step"
    for part in processors:
        if not isinstance(part, _OF_SCORES):
            return f"{type(part).__name__} looks at the tokens of the prompt"
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
