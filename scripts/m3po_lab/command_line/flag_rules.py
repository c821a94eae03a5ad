# SPDX-License-Identifier: Apache-2.0
"""What the values of flags may be, where the libraries say so late or never: ranges of numbers, and texts.

Checked of a run of GRPO and of a pretraining alike, as soon as YAML and command line are parsed: before any library has
computed with them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, get_type_hints

from m3po_lab.core.errors import UserError

TOO_LARGE_SEED = 1 << 32  # numpy's limit


def _whole(value: float, least: int) -> bool:
    return isinstance(value, int) and value >= least


# The rule in words, whether a number keeps it, and the flags it is for.
RULES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "a whole number of at least 1",
        lambda value: _whole(value, 1),
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps eval_accumulation_steps "
        "num_generations_eval max_completion_length pad_to_multiple_of generation_batch_size steps_per_generation "
        "num_iterations ref_model_sync_steps torch_empty_cache_steps dataloader_prefetch_factor ddp_bucket_cap_mb "
        "ddp_timeout num_train_problems num_eval_problems num_sampled_problems lora_r lora_alpha validation_rows depth "
        "model_dim num_heads num_envs rollout_size minibatch_size num_epochs budget max_new_tokens",
    ),
    ("a whole number of at least 2", lambda value: _whole(value, 2), "num_generations max_seq_len"),
    (
        "a whole number of at least 0",
        lambda value: _whole(value, 0),
        "save_total_limit dataloader_num_workers top_k num_completions_to_print max_tool_calling_iterations "
        "num_eval_paths",
    ),
    (
        "a whole number from 0 to 4294967295",
        lambda value: _whole(value, 0) and value < TOO_LARGE_SEED,
        "seed",
    ),
    (
        "a whole number of at least 1, or -1 for the steps that num_train_epochs makes",
        lambda value: _whole(value, 1) or value == -1,
        "max_steps",
    ),
    (
        "a whole number of steps of at least 1, or a share of all steps between 0 and 1",
        lambda value: 0 < value < 1 or (1 <= value < math.inf and value == int(value)),
        "logging_steps save_steps eval_steps",
    ),
    (
        "at least 0",
        lambda value: 0 <= value < math.inf,
        "learning_rate warmup_steps weight_decay adam_epsilon eval_delay neftune_noise_alpha beta epsilon epsilon_high "
        "router_aux_loss_coef entropy_coef entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target "
        "off_policy_mask_threshold ent_coef",
    ),
    ("at least 0", lambda value: value >= 0, "max_grad_norm"),
    (
        "above 0",
        lambda value: 0 < value < math.inf,
        "num_train_epochs temperature repetition_penalty delta sapo_temperature_neg sapo_temperature_pos",
    ),
    (
        "at least 0 and below 1",
        lambda value: 0 <= value < 1,
        "adam_beta1 adam_beta2 label_smoothing_factor lora_dropout",
    ),
    ("above 0 and at most 1", lambda value: 0 < value <= 1, "top_p"),
    ("at least 0 and at most 1", lambda value: 0 <= value <= 1, "min_p ref_model_mixup_alpha top_entropy_quantile"),
)
RULE_OF = {name: (words, keeps) for words, keeps, names in RULES for name in names.split()}
CHOICES: dict[str, tuple[Any, ...]] = {
    "loss_type": ("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "scale_rewards": ("group", "batch", "none", True, False),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
}
NOT_ONLY_TEXT = ("resume_from_checkpoint",)  # declared as a text, and true or false as well


def check_values(values: dict[str, Any], groups: Iterable[type]) -> None:
    """Refuse a value that its flag cannot have.

    Args:
        values: of all flags by name; those from a YAML file may be of any type.
        groups: the dataclasses whose fields the flags are.

    Raises:
        UserError: names the first such flag, its value and the rule.
    """
    for group in groups:
        hints = get_type_hints(group)
        for entry in dataclasses.fields(group):
            value = values.get(entry.name)
            if value is None and (entry.default is None or entry.name not in RULE_OF):
                continue
            rule = _broken_rule(entry.name, value, hints[entry.name])
            if rule is not None:
                raise UserError(f"--{entry.name} {value}: it must be {rule}.")


def _broken_rule(name: str, value: Any, hint: Any) -> str | None:
    """The rule that a value does not keep, in words; None where it keeps its rule or has none."""
    if name in RULE_OF:
        words, keeps = RULE_OF[name]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return None if number and keeps(value) else words
    if name in CHOICES:
        return None if value in CHOICES[name] else f"one of {', '.join(map(str, CHOICES[name]))}"
    if hint in (str, str | None) and name not in NOT_ONLY_TEXT and not isinstance(value, str):
        return "a text: in a YAML file, put it in quotes"
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    return None
