# SPDX-License-Identifier: Apache-2.0
"""The flags of the thinking modes on `GRPOConfig`, and what they cannot be combined with.

`grpo_config.py` inherits and checks them; `m3po/rollouts.py` acts on them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from transformers.m3po import ThinkingSettings
from transformers.m3po.aslr.settings import ASLR_NUMBERS, check_aslr_numbers
from transformers.m3po.flags import check_bounds
from transformers.m3po.gating.factory import gate_class
from transformers.m3po.gating.matched_temperature import MATCH
from transformers.m3po.generation.rollout import SUPPORTED_MODEL_TYPES
from transformers.m3po.settings import CROSS_PATH_MODES, DEFAULT_THOUGHT_TOP_K, RESIDUAL_MODES

MODES = ("none", "m3po", "hrpo", "h3po")
GATING_TRAININGS = ("embeddings", "logits")
# The flags that say what a fresh residual gate starts with; of a model that has one, its config says it.
GATE_START = ("thinking_residual_r_min", "thinking_residual_r_max")
# What generate cuts off a distribution, with the value at which it cuts nothing off.
_NO_TRUNCATION = {"top_k": (0, None), "top_p": (1.0, None), "min_p": (0.0, None), "repetition_penalty": (1.0, None)}
# What `generation_kwargs` may set besides: it changes how, or how long, tokens are sampled, but not from what.
_HARMLESS = {"cache_implementation", "max_new_tokens", "prefill_chunk_size", "use_cache"}


@dataclass
class M3POArguments:
    """The flags of `GRPOConfig` that this overlay adds; names from the seeds (design, the flag table)."""

    mode: str | None = field(
        default=None,
        metadata={
            "help": "How the paths of a group think: `none` (plain GRPO, the control; the default), `m3po` (each "
            "thinking path's input is blended with the tokens its peers sampled, M3PO paper eq. 2-6), `hrpo` (a "
            "learned gate mixes a soft thought into each thinking input, HRPO paper) or `h3po` (hrpo, with the "
            "thoughts of a group blended)."
        },
    )
    enable_cross_path: bool | None = field(
        default=None,
        metadata={
            "help": "Seed 1's way to say the mode, together with thinking_residual_enabled: True for `m3po` and "
            "`h3po`, False for `none` and `hrpo`. Set the mode or these two."
        },
    )
    thinking_residual_enabled: bool | None = field(
        default=None,
        metadata={"help": "Likewise: True for `hrpo` and `h3po`, whose model has HRPO's residual gate."},
    )
    thinking_residual_r_min: float = field(
        default=0.99,
        metadata={"help": "A fresh residual gate's decay is drawn between this and r_max, both in (0, 1)."},
    )
    thinking_residual_r_max: float = field(
        default=0.999, metadata={"help": "Upper end of that, HRPO's Table 5 has 0.999."}
    )
    thinking_residual_gate_learning_rate: float = field(
        default=1e-4, metadata={"help": "Learning rate of the residual gate's two linear layers."}
    )
    thinking_residual_lambda_learning_rate: float = field(
        default=1e-3, metadata={"help": "Learning rate of the residual gate's decay, HRPO's Lambda."}
    )
    thought_top_k: int = field(
        default=DEFAULT_THOUGHT_TOP_K,
        metadata={
            "help": "Likeliest tokens of a distribution that are kept, as a soft thought and for a learnable gate; 0 "
            "keeps the whole vocabulary."
        },
    )
    cross_path_lambda: float = field(
        default=0.1,
        metadata={"help": "Share of the peers in a thinking input, lambda of eq. 2, in [0, 1]. 0 blends nothing."},
    )
    cross_path_temp: float | str | None = field(
        default=None,
        metadata={
            "help": "Temperature of the weights over the peers, T of eq. 5, above 0; `match`: in each group and step "
            "the one at which the attention is as sharp as the baseline's. Default: the gate's (baseline: 0.1)."
        },
    )
    cross_path_phase: str = field(
        default="thinking",
        metadata={"help": "`thinking`: think until the answer marker. `all`: to the end (ablation of seed 1)."},
    )
    cross_path_top_k: int | None = field(
        default=None,
        metadata={"help": "Keep this many peers per path, the ones with the largest weights. Default: all."},
    )
    answer_start: str = field(
        default="####",
        metadata={"help": "The answer marker: the text that ends the thinking phase of a completion."},
    )
    gating_type: str = field(
        default="baseline",
        metadata={
            "help": "The gate, a similarity of two paths' distributions: `baseline` (the paper's cosine, eq. 3), "
            "`raw_dot`, `scaled_dot`, `kl_divergence` or `bhattacharyya`; and two that learn, `luong` and `bahdanau`."
        },
    )
    gating_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Options of the gate as a JSON object: temperature (alias of cross_path_temp), debug; for "
            "`kl_divergence` exact; for `luong` rank (128) and for `bahdanau` attention_dim (256), for both "
            "project_embeddings (false)."
        },
    )
    gating_training: str = field(
        default="embeddings",
        metadata={
            "help": "How a learnable gate gets its gradient: `embeddings` works its weights out again in the policy "
            "pass (the policy that was rolled out), `logits` blends the output distributions of a group (another one)."
        },
    )
    gating_learning_rate: float = field(
        default=1e-3, metadata={"help": "Learning rate of a learnable gate, which has no weight decay."}
    )
    gating_warmup_steps: int = field(
        default=0, metadata={"help": "Optimizer steps at the start in which a learnable gate is trained alone."}
    )
    aslr_enabled: bool | None = field(
        default=None,
        metadata={
            "help": "ASLR (seed 2), on top of any mode: an inner loop over latent paths refines each final hidden "
            "state. True gives the model the modules if it has none. Default: on if the model has them."
        },
    )
    aslr_num_paths: int | None = field(
        default=None, metadata={"help": "Latent paths of a position, P. Default, as of the next five: the model's (4)."}
    )
    aslr_max_iterations: int | None = field(
        default=None, metadata={"help": "Rounds of collaboration, R (2). 0 skips the loop."}
    )
    aslr_threshold: float | None = field(
        default=None,
        metadata={"help": "Router score at which half of the refinement is let in, in [0, 1] (0.5)."},
    )
    aslr_gumbel_temp: float | None = field(
        default=None, metadata={"help": "Scale of the noise on the latent paths (1.0); 0 is deterministic."}
    )
    aslr_cross_path_lambda: float | None = field(
        default=None, metadata={"help": "Share of the other latent paths in a round, in [0, 1] (0.1)."}
    )
    aslr_cross_path_temp: float | None = field(
        default=None, metadata={"help": "Temperature of the attention among latent paths, above 0 (0.1)."}
    )


def thinking_settings(args: Any) -> ThinkingSettings | None:
    """The numbers of the mode of a `GRPOConfig`, None in mode `none`.

    Raises:
        ValueError: one of them breaks its rule, in mode `none` too: a control fails like its pair on a mistyped number.
    """
    names = (
        "cross_path_lambda",
        "cross_path_temp",
        "cross_path_phase",
        "cross_path_top_k",
        "thought_top_k",
        "answer_start",
        "gating_type",
    )
    settings = ThinkingSettings(
        mode="m3po" if args.mode == "none" else args.mode,
        **{name: getattr(args, name) for name in names},
        gating_config=args.gating_config or {},
    )
    return None if args.mode == "none" else settings


def check_m3po_arguments(args: Any) -> None:
    """Hook at the end of `GRPOConfig.__post_init__`: settles `mode` and refuses what cannot work, before any work.

    Raises:
        ValueError: one line that names the flag, the rule and what to set.
    """
    switches = {"enable_cross_path": CROSS_PATH_MODES, "thinking_residual_enabled": RESIDUAL_MODES}
    given = {name: getattr(args, name) for name in switches if getattr(args, name) is not None}
    if args.mode is None:
        wanted = [bool(given.get(name)) for name in switches]
        args.mode = next(mode for mode in MODES if [mode in modes for modes in switches.values()] == wanted)
    if args.mode not in MODES:
        raise ValueError(f"mode={args.mode!r} is unknown; set one of {', '.join(MODES)}.")
    for name, value in given.items():
        if value != (args.mode in switches[name]):
            raise ValueError(f"mode={args.mode!r} and {name}={value} contradict each other; set mode alone.")
    for name, modes in switches.items():
        setattr(args, name, args.mode in modes)
    _settle_gating(args)
    check_bounds(args.thinking_residual_r_min, args.thinking_residual_r_max)
    for name in ("thinking_residual_gate_learning_rate", "thinking_residual_lambda_learning_rate"):
        if not getattr(args, name) >= 0.0:
            raise ValueError(f"{name}={getattr(args, name)} is below 0; HRPO uses 1e-4 for the gate, 1e-3 for Lambda.")
    check_aslr_numbers({name: getattr(args, name) for name in ASLR_NUMBERS})
    if args.mode != "none":
        _check_distribution(args)
    if args.mode != "none" or args.aslr_enabled:
        _check_engine(args)
    if args.mode in CROSS_PATH_MODES:
        _check_whole_groups(args)


def what_needs_generate(args: Any) -> str:
    """The flag whose rollouts must come from `generate`, as a message names it."""
    return f"mode={args.mode!r}" if args.mode != "none" else "aslr_enabled=True"


def _check_engine(args: Any) -> None:
    what = what_needs_generate(args)
    if args.use_vllm:
        why = "vLLM does not let paths interact" if args.mode != "none" else "vLLM has no such modules"
        raise ValueError(f"use_vllm=True cannot be combined with {what}: {why}.")
    if args.use_transformers_continuous_batching:
        raise ValueError(f"use_transformers_continuous_batching=True cannot be combined with {what}: set it to False.")


def _settle_gating(args: Any) -> None:
    """Reads T from a command line, fills in what says the size of a learnable gate, and checks the numbers."""
    if isinstance(args.cross_path_temp, str) and args.cross_path_temp != MATCH:
        try:
            args.cross_path_temp = float(args.cross_path_temp)
        except ValueError as error:
            raise ValueError(
                f"cross_path_temp={args.cross_path_temp!r} is neither a number above 0 nor {MATCH!r}."
            ) from error
    thinking_settings(args)
    gate = gate_class(args.gating_type)
    if args.gating_training not in GATING_TRAININGS:
        raise ValueError(
            f"gating_training={args.gating_training!r} is unknown; set one of {', '.join(GATING_TRAININGS)}."
        )
    if not args.gating_learning_rate >= 0.0:
        raise ValueError(f"gating_learning_rate={args.gating_learning_rate} is below 0; the default is 1e-3.")
    if args.gating_warmup_steps < 0:
        raise ValueError(f"gating_warmup_steps={args.gating_warmup_steps} is below 0; 0 is none.")
    if not gate.learnable:
        for name, default in (("gating_training", "embeddings"), ("gating_warmup_steps", 0)):
            if getattr(args, name) != default:
                raise ValueError(
                    f"{name}={getattr(args, name)!r} does nothing with gating_type={args.gating_type!r}, which has no "
                    "parameters; leave it out, or set gating_type='luong' or 'bahdanau'."
                )
        return
    args.gating_config = {**(args.gating_config or {}), **gate.structure(args.gating_config)}
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
    given = {name: getattr(args, name) for name in _NO_TRUNCATION} | (args.generation_kwargs or {})
    for name, allowed in _NO_TRUNCATION.items():
        if given[name] not in allowed:
            raise ValueError(
                f"{name}={given[name]} changes the distribution a token is sampled from, which the policy pass does "
                f"not see; mode={args.mode!r} needs {name}={allowed[0]}."
            )
    if given.get("cache_implementation", args.cache_implementation) == "quantized":
        raise ValueError(
            f"cache_implementation='quantized' changes the numbers of a rollout but not those of the policy pass; "
            f"leave it out, or set mode='none' instead of {args.mode!r}."
        )
    if given.get("num_beams", 1) != 1:
        raise ValueError(f"num_beams={given['num_beams']} cannot be combined with mode={args.mode!r}; set num_beams=1.")
    for name in sorted(set(given) - set(_NO_TRUNCATION) - _HARMLESS - {"num_beams"}):
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
            f"{model.config.model_type!r}. {mend} or take another model."
        )
