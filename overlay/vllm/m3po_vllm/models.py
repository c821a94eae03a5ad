# SPDX-License-Identifier: Apache-2.0
"""The models of vLLM with the modules that this overlay adds: a residual gate, a learnable gating function.

They sit on the base model under the names of the checkpoint, so that vLLM loads them, and takes them anew from a
trainer, as every other weight.
"""

from __future__ import annotations

from typing import Any

from transformers.m3po.modules import ASLR, GATING, HYPER_CONNECTIONS, RESIDUAL_GATE
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM


def add_to(model: Any) -> None:
    """Makes the modules that the configuration of a model has on its base model.

    Raises:
        ValueError: it has some that vLLM's forward does not call.
    """
    for modules in (ASLR, HYPER_CONNECTIONS):
        if modules.on(model):
            raise ValueError(f"{modules.switch}=True: vLLM's forward has no {modules.noun}; decode with transformers.")
    RESIDUAL_GATE.add(model.model)
    GATING.add(model.model)


class M3POLlamaForCausalLM(LlamaForCausalLM):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **options: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **options)
        add_to(self)


class M3POQwen2ForCausalLM(Qwen2ForCausalLM):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        add_to(self)


class M3POQwen3ForCausalLM(Qwen3ForCausalLM):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        add_to(self)
