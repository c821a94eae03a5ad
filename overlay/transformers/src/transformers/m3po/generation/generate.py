# SPDX-License-Identifier: Apache-2.0
"""`generate_with_m3po`: a thin wrapper around `model.generate` with the signature of the prototype notes."""

from __future__ import annotations

from typing import Any

import torch

from ..thinking.interaction import GatingFunction, Temperature
from .output import M3POGenerateOutput
from .state import M3POGenerationState


def generate_with_m3po(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    max_new_tokens: int = 512,
    num_generations: int = 4,
    lambda_blend: float = 0.1,
    temperature_m3po: Temperature | None = None,
    gating_function: GatingFunction | None = None,
    tokenizer: Any = None,
    **generate_kwargs: Any,
) -> M3POGenerateOutput:
    """Samples `num_generations` paths per prompt that interact while they think.

    Args:
        model: a Llama or Qwen2 model with a language modelling head.
        input_ids, attention_mask: (B, L) prompts, left padded.
        max_new_tokens, num_generations: length and number of the paths of each prompt.
        lambda_blend, temperature_m3po: λ of eq. 2 and T of eq. 5 (`cross_path_lambda`, `cross_path_temp`); T of None
            is that of the gating function, 0.1 for the cosine.
        gating_function: similarity (G, N, V) -> (G, N, N), or a `BaseM3POGating`, whose temperature and `debug` are
            heeded; None is the cosine.
        tokenizer: finds the answer marker, where the paths of a prompt part; not needed with `cross_path_phase="all"`.
        **generate_kwargs: passed to `generate`. `top_k` is 0 unless given: a cut
            distribution would not be the one whose similarity is taken.

    Returns:
        `M3POGenerateOutput` with (B * num_generations, ...) rows, the paths of a prompt side by side.

    Raises:
        ValueError: as `generate`, e.g. without a tokenizer.
    """
    generate_kwargs.setdefault("top_k", 0)
    return model.generate(
        input_ids,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        num_return_sequences=num_generations,
        do_sample=True,
        enable_cross_path=True,
        cross_path_lambda=lambda_blend,
        cross_path_temp=temperature_m3po,
        return_dict_in_generate=True,
        m3po=M3POGenerationState(gating_function=gating_function, tokenizer=tokenizer),
        **generate_kwargs,
    )
