# SPDX-License-Identifier: Apache-2.0
"""The flags of the thinking modes on `GRPOConfig`, and what a checkpoint says of them.

`grpo_config.py` inherits them, `checks.py` refuses what cannot work, `rollouts.py` acts on them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from transformers.m3po import ThinkingSettings
from transformers.m3po.aslr.settings import ASLR_HYPERPARAMETERS
from transformers.m3po.settings import DEFAULT_THOUGHT_TOP_K, RESIDUAL_MODES

MODES = ("none", "m3po", "hrpo", "h3po")
GATING_TRAININGS = ("embeddings", "logits")
SHARING = ("auto", "true", "false")
ROLLOUT_ENGINES = ("generate", "vllm")
# The flags that say what a fresh residual gate starts with; of a model that has one, its config says it.
RESIDUAL_GATE_START = ("thinking_residual_r_min", "thinking_residual_r_max")


@dataclass
class M3POArguments:
    """The flags of `GRPOConfig` that this overlay adds."""

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
            "help": "Another way to say the mode, together with thinking_residual_enabled: True for `m3po` and "
            "`h3po`, False for `none` and `hrpo`. Set the mode or these two."
        },
    )
    thinking_residual_enabled: bool | None = field(
        default=None,
        metadata={
            "help": "The other half of enable_cross_path: True for `hrpo` and `h3po`, whose model has HRPO's residual "
            "gate, False for `none` and `m3po`."
        },
    )
    thinking_residual_r_min: float = field(
        default=0.99,
        metadata={"help": "A fresh residual gate's decay is drawn between this and r_max, both in (0, 1)."},
    )
    thinking_residual_r_max: float = field(
        default=0.999,
        metadata={"help": "Upper end of what a fresh residual gate's decay is drawn from; HRPO's Table 5 has 0.999."},
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
            "help": "Likeliest tokens of a distribution that are kept, as a soft thought and for a learnable gating "
            "function; 0 keeps the whole vocabulary."
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
            "the one at which the attention is as sharp as the baseline's. Default: the gating function's (baseline: "
            "0.1)."
        },
    )
    cross_path_phase: str = field(
        default="thinking",
        metadata={"help": "`thinking`: think until the answer marker. `all`: think to the end (an ablation)."},
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
            "help": "The gating function, a similarity of two paths' distributions: `baseline` (the paper's cosine, "
            "eq. 3), `raw_dot`, `scaled_dot`, `kl_divergence` or `bhattacharyya`; two that learn, `luong` and "
            "`bahdanau`; and the placebos `uniform`, `random` and `shuffled`."
        },
    )
    gating_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Options of the gating function as a JSON object: temperature (alias of cross_path_temp), debug; "
            "for `kl_divergence` exact; for `luong` rank (128) and for `bahdanau` attention_dim (256), for both "
            "project_embeddings (false)."
        },
    )
    gating_training: str = field(
        default="embeddings",
        metadata={
            "help": "How a learnable gating function gets its gradient: `embeddings` works its weights out again in "
            "the policy pass (the policy that was rolled out), `logits` blends the output distributions of a group "
            "(another one)."
        },
    )
    gating_learning_rate: float = field(
        default=1e-3, metadata={"help": "Learning rate of a learnable gating function, which has no weight decay."}
    )
    gating_warmup_steps: int = field(
        default=0,
        metadata={"help": "Optimizer steps at the start in which a learnable gating function is trained alone."},
    )
    rollout_engine: str = field(
        default="generate",
        metadata={
            "help": "What decodes the rollouts: `generate` of Transformers (or what TRL's own flags say), or `vllm`, "
            "in the process of the trainer, with the thinking of the mode; it needs the extra vllm of the environment "
            "(docs/engines.md) and sets use_vllm."
        },
    )
    shared_prefix: str = field(
        default="false",
        metadata={
            "help": "Read the prompt of a group once for all its paths, in the rollouts and in the scoring passes, and "
            "draw each token with one random number: `auto` where it computes the same (the first lines of a run say "
            "whether and why), `true` (refused where it does not), `false`: TRL's own way, bit for bit. Our scripts "
            "set `auto`."
        },
    )
    blend_kl_steps: int | None = field(
        default=0,
        metadata={
            "help": "Measure what thinking does to the next token (`m3po/blend_kl`, `thought_kl`, `aslr_kl`) in every "
            "so many optimizer steps, by scoring a group once with and once without; 0: never. None, as our scripts "
            "have it: eight times a run. Not under Unsloth, whose forward makes no logits."
        },
    )
    aslr_enabled: bool | None = field(
        default=None,
        metadata={
            "help": "ASLR, on top of any mode: an inner loop over latent paths refines each final hidden "
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
    """The hyperparameters of the mode of a `GRPOConfig`, None in mode `none`.

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


def checkpoint_info(args: Any) -> dict[str, Any]:
    """What `m3po.json` says of a checkpoint of a run with these arguments (a `GRPOConfig`)."""
    settings = thinking_settings(args)
    return {
        **({"mode": args.mode, "answer_start": args.answer_start} if settings is None else settings.hyperparameters()),
        **({name: getattr(args, name) for name in RESIDUAL_GATE_START} if args.mode in RESIDUAL_MODES else {}),
        **(
            {name: getattr(args, name) for name in ("aslr_enabled", *ASLR_HYPERPARAMETERS)} if args.aslr_enabled else {}
        ),
        **({"gating_training": args.gating_training} if settings is not None and settings.learns else {}),
        "num_generations": args.num_generations,
        "sampling_temperature": args.temperature,
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
    }
