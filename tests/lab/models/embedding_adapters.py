# SPDX-License-Identifier: Apache-2.0
"""Adapters that touch the embeddings, on models whose head is the embedding matrix (tied) and on models of two."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

# What an adapter may do to one or both of the pair: arguments of `LoraConfig`.
WAYS: dict[str, dict[str, Any]] = {
    "LoRA on embed_tokens": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA on lm_head": {"target_modules": ["q_proj", "lm_head"]},
    "LoRA on both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "LoRA on all-linear": {"target_modules": "all-linear"},
    "embed_tokens whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "lm_head whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "both whole, tied": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
        "ensure_weight_tying": True,
    },
    "LoRA on embed_tokens, tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "DoRA on embed_tokens": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "rank-stabilised LoRA on both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_rslora": True},
    "LoRA on the matrix of lm_head": {"target_modules": ["q_proj"], "target_parameters": ["lm_head.weight"]},
    "three tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4, 5]},
}


def with_tying(plain: Path, folder: Path, tied: bool) -> Path:
    """A copy of the tiny model in `folder`, its head tied to its embeddings or not."""
    AutoTokenizer.from_pretrained(plain).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(plain)
    model.config.tie_word_embeddings = tied
    model.tie_weights()
    model.save_pretrained(folder)
    return folder


def far_from_start(model: PreTrainedModel) -> None:
    """Moves all that an adapter trains, as a long training would (in place)."""
    draws = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.3 * torch.randn(weight.shape, generator=draws)


def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Of two rows that have every token of the tiny vocabulary; the model's mode is left as it was."""
    training = model.training
    with torch.no_grad():
        found = model.eval()(torch.arange(22).reshape(2, 11) if ids is None else ids).logits
    model.train(training)
    return found
