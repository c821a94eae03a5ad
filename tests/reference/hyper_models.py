# SPDX-License-Identifier: Apache-2.0
"""Tiny models with hyper-connections: at their start, as if trained, and with a start that cannot learn."""

from __future__ import annotations

import math
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
BAD_TAU, BAD_BASE = 0.05, -8.0  # a start at which hyper-connections cannot learn


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


def put_in_the_start_that_cannot_learn(mixer: Any) -> Any:
    """A sharp initialisation in a mixer's own parameters: -8 beside the diagonal, stream 0 read by every
    layer, projections drawn and not scaled. Its tau is an argument of the mixer."""
    streams = mixer.num_streams
    with torch.no_grad():
        base = torch.full((streams, streams), BAD_BASE).fill_diagonal_(0.0)
        pre = torch.full((streams,), BAD_BASE)
        pre[0] = 0.0
        mixer.bias.copy_(torch.cat([pre + math.log(streams - 1), torch.zeros(streams), base.flatten()]))
        mixer.phi.normal_(std=0.01)
        mixer.scale_bias.fill_(1.0)
    return mixer
