# SPDX-License-Identifier: Apache-2.0
"""What a mode or ASLR cannot be combined with: of the arguments when they are read, of the trainer when it is made."""

from __future__ import annotations

import inspect
import math
from importlib.util import find_spec
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import MinPLogitsWarper, TemperatureLogitsWarper
from transformers.m3po import ThinkingSettings
from transformers.m3po.aslr.settings import ASLR_HYPERPARAMETERS, check_aslr_hyperparameters
from transformers.m3po.flags import ADD_A_FAMILY, SUPPORTED_MODEL_TYPES, check_bounds
from transformers.m3po.gating.factory import gating_class
from transformers.m3po.gating.matched_temperature import MATCH
from transformers.m3po.settings import CROSS_PATH_MODES, RESIDUAL_MODES

from .config import GATING_TRAININGS, MODES, ROLLOUT_ENGINES, SHARING, thinking_settings

# What generate cuts off a distribution, with the value at which it cuts nothing off.
_NO_TRUNCATION = {"top_k": (0, None), "top_p": (1.0, None), "min_p": (0.0, None), "repetition_penalty": (1.0, None)}
# What `generation_kwargs` may set besides: it changes how, or how long, tokens are sampled, but not from what.
_HARMLESS = {"cache_implementation", "max_new_tokens", "prefill_chunk_size", "use_cache"}
# The methods of a trainer between a rollout and its loss.
RECORD_METHODS = ("_generate_and_score_completions", "_get_per_token_logps_and_entropies", "_compute_loss")


def check_m3po_arguments(args: Any) -> None:
    """Hook at the end of `GRPOConfig.__post_init__`: settles `mode` and refuses what cannot work, before any work.

    Raises:
        ValueError: one line that names the flag, the rule and what to set.
    """
    switches = {"enable_cross_path": CROSS_PATH_MODES, "thinking_residual_enabled": RESIDUAL_MODES}
    requested = {name: getattr(args, name) for name in switches if getattr(args, name) is not None}
    if args.mode is None:
        wanted = [bool(requested.get(name)) for name in switches]
        args.mode = next(mode for mode in MODES if [mode in modes for modes in switches.values()] == wanted)
    if args.mode not in MODES:
        raise ValueError(f"mode={args.mode!r} is unknown; set one of {', '.join(MODES)}.")
    for name, value in requested.items():
        if value != (args.mode in switches[name]):
            raise ValueError(f"mode={args.mode!r} and {name}={value} contradict each other; set mode alone.")
    for name, modes in switches.items():
        setattr(args, name, args.mode in modes)
    args.shared_prefix = str(args.shared_prefix).lower()  # YAML's true and false are no texts
    if args.shared_prefix not in SHARING:
        raise ValueError(f"shared_prefix={args.shared_prefix!r} is unknown; set one of {', '.join(SHARING)}.")
    if args.blend_kl_steps is not None and args.blend_kl_steps < 0:
        raise ValueError(f"blend_kl_steps={args.blend_kl_steps} is below 0; 0 is never.")
    _prepare_gating(args)
    check_bounds(args.thinking_residual_r_min, args.thinking_residual_r_max)
    for name in ("thinking_residual_gate_learning_rate", "thinking_residual_lambda_learning_rate"):
        if not getattr(args, name) >= 0.0:
            raise ValueError(
                f"{name}={getattr(args, name)} is below 0; HRPO uses 1e-4 for the residual gate, 1e-3 for Lambda."
            )
    check_aslr_hyperparameters({name: getattr(args, name) for name in ASLR_HYPERPARAMETERS})
    if args.mode != "none":
        _check_distribution(args)
    _check_rollout_engine(args)
    if args.mode != "none" or args.aslr_enabled:
        _check_engine(args)
    if args.mode in CROSS_PATH_MODES:
        _check_whole_groups(args)


def what_needs_generate(args: Any) -> str:
    """The flag whose rollouts must come from `generate`, as a message names it."""
    return f"mode={args.mode!r}" if args.mode != "none" else "aslr_enabled=True"


def check_trainer(trainer: Any, settings: ThinkingSettings | None, elsewhere: list[str]) -> None:
    """Refuses a trainer whose rollouts or scoring passes cannot carry what a mode or ASLR needs.

    Args:
        trainer: the `GRPOTrainer`, after its arguments and models are set.
        settings: of the mode, None in mode `none`.
        elsewhere: what moves the rollouts out of a single call of `generate`, by name.

    Raises:
        ValueError: one line that names the feature and what to set.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    what = what_needs_generate(trainer.args)
    record = "bags" if trainer.args.mode != "none" else "seeds"
    mends = {"set mode='none'": trainer.args.mode != "none", "train without ASLR": trainer.args.aslr_enabled}
    mend = " and ".join(way for way, needed in mends.items() if needed)
    check_model_type(model, what)
    if elsewhere:
        why = "where the paths interact" if trainer.args.mode != "none" else "which records the seeds of its noise"
        raise ValueError(
            f"{elsewhere[0]} cannot be combined with {what}: its rollouts are not decoded in one call of generate, "
            f"{why}. Leave it out, or {mend}."
        )
    kind = type(trainer)
    if (own := method_without_record(kind)) is not None:
        way = "take GRPOTrainer"
        if kind.__name__.startswith("Unsloth"):
            way = "this Unsloth lacks the patches of this overlay; take those of `make env EXTRA=unsloth`"
        raise ValueError(
            f"{kind.__name__} has its own {own}, which does not hand the {record} of {what} to the policy pass; "
            f"{way}, or {mend}."
        )
    if settings is not None:
        _check_policy_distribution(trainer, model)
        if settings.learns:
            _check_gating(trainer)


def _check_gating(trainer: Any) -> None:
    args = trainer.args
    engine = trainer.accelerator.distributed_type
    if engine in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"gating_type={args.gating_type!r} cannot be trained with {engine.value}: a rollout reads the gating "
            "function outside the forward pass, where its parameters are split over the processes. Take DDP "
            "(configs/accelerate), or a gating function without parameters."
        )
    if args.gating_training == "logits" and engine != DistributedType.NO:
        raise ValueError(
            "gating_training='logits' cannot be trained by several processes: it reads the gating function behind the "
            "model's forward, where DDP does not see it. Train in one process, or set gating_training='embeddings'."
        )
    if args.gating_training == "logits" and type(trainer).__name__.startswith("Unsloth"):
        raise ValueError(
            "gating_training='logits' blends output distributions, which Unsloth's log-prob pass never makes; "
            "train with TRL's own trainer, or set gating_training='embeddings'."
        )
    if args.gating_training == "logits" and args.cast_lm_head_to_fp32:
        raise ValueError(
            "cast_lm_head_to_fp32 is a feature of the fused head, which gating_training='logits' does not use; set "
            "it to False."
        )


def _check_policy_distribution(trainer: Any, model: Any) -> None:
    """Refuses what makes rollout and policy pass two distributions, wherever it was set."""
    if has_dropout(model):
        raise ValueError(
            f"dropout draws other numbers in the policy pass than in the rollout; mode={trainer.args.mode!r} needs "
            "none of it: set lora_dropout to 0 (or disable_dropout=True), and attention_dropout of the model config "
            "to 0."
        )
    if trainer.use_vllm:
        return  # its sampling parameters are the trainer's arguments alone
    _, processors = generation_of(trainer, model)
    cut = [part for part in processors if not (isinstance(part, TemperatureLogitsWarper) or _keeps_all(part))]
    if cut:
        raise ValueError(
            f"{', '.join(type(part).__name__ for part in cut)} would change the distribution that rollouts are "
            f"sampled from, which the policy pass does not see; it comes from a flag set to null or from the "
            f"model's generation_config. mode={trainer.args.mode!r} needs top_k=0, top_p=1.0, min_p=0.0, "
            "repetition_penalty=1.0 and none of its kin in model.generation_config."
        )


def has_dropout(model: Any) -> bool:
    """Whether a training forward of the model drops anything, an adapter's layers included."""
    rates = [part.p for part in model.modules() if isinstance(part, torch.nn.Dropout)]
    return any([*rates, getattr(model.config, "attention_dropout", 0.0)])


def generation_of(trainer: Any, model: Any) -> tuple[Any, list[Any]]:
    """The generation config of a trainer's rollouts as `generate` completes it, and the logits processors it makes."""
    # Fields that are None here are filled from the model's generation_config, then from upstream's defaults.
    config, _ = model._prepare_generation_config(trainer.generation_config)
    model._prepare_special_tokens(config, True, device="cpu")
    return config, model._get_logits_processor(config, input_ids_seq_length=1, device="cpu")


def method_without_record(kind: Any) -> str | None:
    """The first function between a rollout and its loss that does not carry the rollout's record; None if all do.

    The contract: a class whose body defines one of `RECORD_METHODS` says `carries_rollout_record = True` there too (a
    wrapper that was laid on from outside, as Unsloth does, is passed over); the log-prob pass takes the record as
    `m3po_inputs`, and a loss that is no method (`grpo_accumulated_loss` in the module of Unsloth's trainer) takes the
    micro-batch that holds the record as `m3po_batch`.
    """
    for name in RECORD_METHODS:
        owner = next((parent for parent in kind.__mro__ if _defines(parent, name)), None)
        if owner is None or not vars(owner).get("carries_rollout_record", False):
            return name
    if "m3po_inputs" not in inspect.signature(kind._get_per_token_logps_and_entropies).parameters:
        return "_get_per_token_logps_and_entropies"
    loss = inspect.unwrap(kind.compute_loss).__globals__.get("grpo_accumulated_loss")
    if loss is not None and "m3po_batch" not in inspect.signature(loss).parameters:
        return "grpo_accumulated_loss"
    return None


def _defines(kind: type, name: str) -> bool:
    """Whether the body of a class defines a method."""
    return getattr(vars(kind).get(name), "__qualname__", "") == f"{kind.__qualname__}.{name}"


def _keeps_all(processor: Any) -> bool:
    return isinstance(processor, MinPLogitsWarper) and processor.min_p == 0


def _check_engine(args: Any) -> None:
    what = what_needs_generate(args)
    if args.use_vllm and args.rollout_engine != "vllm":
        why = "let paths interact: set rollout_engine='vllm'" if args.mode != "none" else "have such modules"
        raise ValueError(f"use_vllm=True cannot be combined with {what}: TRL's use of vLLM does not {why}.")
    if args.use_transformers_continuous_batching:
        raise ValueError(f"use_transformers_continuous_batching=True cannot be combined with {what}: set it to False.")


def _check_rollout_engine(args: Any) -> None:
    if args.rollout_engine not in ROLLOUT_ENGINES:
        raise ValueError(f"rollout_engine={args.rollout_engine!r} is unknown; set one of {', '.join(ROLLOUT_ENGINES)}.")
    if args.rollout_engine == "generate":
        return
    needed = {
        "aslr_enabled": (args.aslr_enabled or False, False),  # vLLM's forward has no such modules
        "vllm_mode": (args.vllm_mode, "colocate"),  # a server hands no record back
        "vllm_tensor_parallel_size": (args.vllm_tensor_parallel_size, 1),
        "vllm_model_impl": (args.vllm_model_impl, "vllm"),
        "vllm_structured_outputs_regex": (args.vllm_structured_outputs_regex, None),
        "generation_kwargs": (args.generation_kwargs or None, None),
    }
    for name, (value, allowed) in needed.items():
        if value != allowed:
            raise ValueError(f"{name}={value!r} cannot be combined with rollout_engine='vllm': set {allowed!r}.")
    for package in ("vllm", "m3po_vllm"):
        if find_spec(package) is None:
            raise ValueError(f"rollout_engine='vllm' needs {package}, which is not installed: make env EXTRA=vllm.")
    args.use_vllm = True


def _prepare_gating(args: Any) -> None:
    """Reads T from a command line, fills in what says the size of a learnable gating function, checks the values."""
    if isinstance(args.cross_path_temp, str) and args.cross_path_temp != MATCH:
        try:
            args.cross_path_temp = float(args.cross_path_temp)
        except ValueError as error:
            raise ValueError(
                f"cross_path_temp={args.cross_path_temp!r} is neither a number above 0 nor {MATCH!r}."
            ) from error
    thinking_settings(args)
    gating = gating_class(args.gating_type)
    if args.gating_training not in GATING_TRAININGS:
        raise ValueError(
            f"gating_training={args.gating_training!r} is unknown; set one of {', '.join(GATING_TRAININGS)}."
        )
    if not args.gating_learning_rate >= 0.0:
        raise ValueError(f"gating_learning_rate={args.gating_learning_rate} is below 0; the default is 1e-3.")
    if args.gating_warmup_steps < 0:
        raise ValueError(f"gating_warmup_steps={args.gating_warmup_steps} is below 0; 0 is none.")
    if not gating.learnable:
        for name, default in (("gating_training", "embeddings"), ("gating_warmup_steps", 0)):
            if getattr(args, name) != default:
                raise ValueError(
                    f"{name}={getattr(args, name)!r} does nothing with gating_type={args.gating_type!r}, which has no "
                    "parameters; leave it out, or set gating_type='luong' or 'bahdanau'."
                )
        return
    args.gating_config = {**(args.gating_config or {}), **gating.structure(args.gating_config)}
    if args.mode not in CROSS_PATH_MODES:
        return
    if args.gating_training == "logits" and args.mode != "m3po":
        raise ValueError(
            f"gating_training='logits' scores plain tokens, so mode={args.mode!r} would not train its residual gate; "
            "set gating_training='embeddings', or mode='m3po'."
        )
    rows, group = args.per_device_train_batch_size, args.num_generations
    if rows % group:
        raise ValueError(
            f"per_device_train_batch_size={rows} does not hold whole groups of num_generations={group}: "
            f"gating_type={args.gating_type!r} learns from all paths of a group in one micro-batch. Set it to "
            f"{_multiples_around(rows, group)}, with gradient_accumulation_steps for the rest."
        )


def _check_distribution(args: Any) -> None:
    requested = {name: getattr(args, name) for name in _NO_TRUNCATION} | (args.generation_kwargs or {})
    for name, allowed in _NO_TRUNCATION.items():
        if requested[name] not in allowed:
            raise ValueError(
                f"{name}={requested[name]} changes the distribution a token is sampled from, which the policy pass "
                f"does not see; mode={args.mode!r} needs {name}={allowed[0]}."
            )
    if requested.get("cache_implementation", args.cache_implementation) == "quantized":
        raise ValueError(
            f"cache_implementation='quantized' changes the numbers of a rollout but not those of the policy pass; "
            f"leave it out, or set mode='none' instead of {args.mode!r}."
        )
    if requested.get("num_beams", 1) != 1:
        raise ValueError(
            f"num_beams={requested['num_beams']} cannot be combined with mode={args.mode!r}; set num_beams=1."
        )
    for name in sorted(set(requested) - set(_NO_TRUNCATION) - _HARMLESS - {"num_beams"}):
        raise ValueError(
            f"generation_kwargs has {name}, which can change the distribution a token is sampled from; with "
            f"mode={args.mode!r} it may hold {', '.join(sorted(_HARMLESS))} only. Leave it out."
        )


def _check_whole_groups(args: Any) -> None:
    rows, steps, group = args.per_device_train_batch_size, args.steps_per_generation, args.num_generations
    if rows * steps % group:
        # Where generation_batch_size was given, steps_per_generation follows from it and another batch size is no mend.
        all_rows = math.lcm(rows, group) * args.world_size
        raise ValueError(
            f"per_device_train_batch_size * steps_per_generation = {rows} * {steps} = {rows * steps} rollouts per "
            f"process do not make whole groups of num_generations={group}, and a group must not be split over "
            f"processes in mode {args.mode!r}; with steps_per_generation={steps}, set per_device_train_batch_size to "
            f"{_multiples_around(rows, group // math.gcd(group, steps))}, or set generation_batch_size to "
            f"{_multiples_around(args.generation_batch_size, all_rows)} in place of steps_per_generation."
        )
    group = args.num_generations_eval or args.num_generations
    if args.eval_strategy != "no" and args.per_device_eval_batch_size % group:
        raise ValueError(
            f"per_device_eval_batch_size={args.per_device_eval_batch_size} does not hold whole groups of {group}; "
            f"set it to {_multiples_around(args.per_device_eval_batch_size, group)}."
        )


def _multiples_around(number: int, unit: int) -> str:
    """The nearest positive multiples of `unit` below and above a number that is none, as text."""
    below = number // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


def check_model_type(model: Any, what: str) -> None:
    """Refuses a model into which a mode or ASLR is not built; `what` is the flag and its value.

    Raises:
        ValueError: it names the model's type and those that are.
    """
    if model.config.model_type not in SUPPORTED_MODEL_TYPES:
        mend = "Set mode='none'" if what.startswith("mode") else "Leave it out"
        raise ValueError(
            f"{what} is built into {', '.join(SUPPORTED_MODEL_TYPES)} models; this one is "
            f"{model.config.model_type!r}. {mend}, take another model, or add this one ({ADD_A_FAMILY})."
        )
