# SPDX-License-Identifier: Apache-2.0
"""The model families with thinking inputs: the one list over which every test of a patched model file runs.

A family has its name in Transformers' classes and what its tiny models need besides the common sizes, so that they have
what sets the family apart.
"""

from __future__ import annotations

from typing import Any

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    # Heads wider than their share of the hidden size; queries and keys have norms.
    "qwen3": ("Qwen3", {"head_dim": 16}),
    # The second of two layers reads no positions.
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
}
WITH_STREAMS = {**FAMILIES, "nanochat": ("NanoChat", {})}  # hyper-connections alone
ARCHITECTURES = {name: more for name, more in WITH_STREAMS.values()}


def build(family: str, config: dict[str, Any]) -> Any:
    """A model with its head, of fresh weights from torch's generator."""
    import transformers

    name, more = WITH_STREAMS[family]
    made = getattr(transformers, f"{name}Config")(**{**more, **config})
    return getattr(transformers, f"{name}ForCausalLM")(made)
