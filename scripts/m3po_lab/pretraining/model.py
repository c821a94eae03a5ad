# SPDX-License-Identifier: Apache-2.0
"""A fresh NanoChat of the size that the flags ask for, with hyper-connections or without."""

from __future__ import annotations

from typing import Any

import torch
from transformers import NanoChatConfig, NanoChatForCausalLM

from m3po_lab.pretraining.arguments import PretrainArguments, mhc_numbers


def make_model(script: PretrainArguments, vocabulary: int, tokenizer: Any) -> NanoChatForCausalLM:
    """A fresh NanoChat; the weights besides those of mHC are the same for the same torch seed, with it or without."""
    config = NanoChatConfig(
        vocab_size=vocabulary,
        hidden_size=script.model_dim,
        intermediate_size=4 * script.model_dim,
        num_hidden_layers=script.depth,
        num_attention_heads=script.num_heads,
        max_position_embeddings=script.max_seq_len,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **({"mhc_enabled": True, **mhc_numbers(script)} if script.mhc_enabled else {}),
    )
    model = NanoChatForCausalLM(config)
    if script.nanochat_init:
        start_as_nanochat(model)
    return model


@torch.no_grad()
def start_as_nanochat(model: NanoChatForCausalLM) -> None:
    """nanochat's own start (gpt.py of January 2026), in place.

    Embeddings N(0, 1), head N(0, 0.001), matrices uniform in ±sqrt(3 / H), output projections 0: at the first step
    every layer is the identity, with hyper-connections and without. Drawn from a generator of its own, with torch's
    seed.
    """
    bound = (3.0 / model.config.hidden_size) ** 0.5
    generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
    model.model.embed_tokens.weight.normal_(0, 1, generator=generator)
    model.lm_head.weight.normal_(0, 0.001, generator=generator)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for module in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.fc1):
            module.weight.uniform_(-bound, bound, generator=generator)
        for module in (attention.o_proj, mlp.fc2):
            module.weight.zero_()


def describe(model: NanoChatForCausalLM, script: PretrainArguments) -> str:
    """The model in a few words."""
    count = sum(value.numel() for value in model.parameters())
    streams = f", {script.mhc_num_streams} streams by {script.mhc_residual}" if script.mhc_enabled else ""
    return f"NanoChat of {script.depth} layers, {count / 1e6:.2f} M parameters{streams}, on {script.dataset}"
