# SPDX-License-Identifier: Apache-2.0
"""Tiny models with hyper-connections, at their start and as if trained."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from reference.families import ARCHITECTURES
from transformers.m3po.hyper_connections.connections import MHC_MODULES

SIZES = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ON = {"mhc_enabled": True}


def make(architecture: str, seed: int = 0, **config: Any) -> Any:
    """A tiny seeded model in evaluation mode; with hyper-connections, its other weights are the plain one's."""
    torch.manual_seed(seed)
    own = {**SIZES, **ARCHITECTURES[architecture]}
    plain = getattr(transformers, f"{architecture}ForCausalLM")(getattr(transformers, f"{architecture}Config")(**own))
    if not config:
        return plain.eval()
    model = type(plain)(type(plain.config)(**{**own, **config}))
    same_sizes = model.config.vocab_size == plain.config.vocab_size
    if same_sizes and plain.state_dict().keys() <= model.state_dict().keys():
        model.load_state_dict(plain.state_dict(), strict=False)
    return model.eval()


def trained(architecture: str, **config: Any) -> Any:
    """A model whose hyper-connections have left their start, on purpose far: H_res mixes, nothing is symmetric."""
    model = make(architecture, **ON, **config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if any(part in MHC_MODULES for part in name.split(".")):
                value.add_(0.6 * torch.randn_like(value))
    return model


def gradients(model: Any, ids: torch.Tensor | None = None) -> float:
    """One backward pass of the language model's loss, whose value it returns."""
    ids = torch.randint(3, 256, (3, 12), generator=torch.Generator().manual_seed(4)) if ids is None else ids
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    return float(loss)
