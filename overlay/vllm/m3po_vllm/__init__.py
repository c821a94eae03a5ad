# SPDX-License-Identifier: Apache-2.0
"""Thinking inputs and cross-path interaction in vLLM, as a plugin of it: no file of vLLM is patched.

`engine_arguments(settings)` are the arguments of `vllm.LLM` and of `vllm serve` that turn a mode on:

    worker_cls           m3po_vllm.worker.Worker          writes thinking inputs, and the record of them
    scheduler_cls        m3po_vllm.scheduler.Scheduler    keeps the paths of a group in step
    logits_processors    m3po_vllm.requests:Admission     refuses what cannot be, before it starts; or EveryRequest
    additional_config    {"m3po": the mode and its numbers}

A request says its group in `SamplingParams(extra_args=...)`, see `requests.Tag`.
"""

from __future__ import annotations

from typing import Any

CONFIG = "m3po"  # in vLLM's additional_config
# For an engine in the process that uses it, where it is not set: the model runner that the plugin knows; on a CPU the
# threads of the process, and 2 GiB of keys and values.
ENVIRONMENT = {
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "2",
}
ARCHITECTURES = {
    "LlamaForCausalLM": "M3POLlamaForCausalLM",
    "Qwen2ForCausalLM": "M3POQwen2ForCausalLM",
    "Qwen3ForCausalLM": "M3POQwen3ForCausalLM",
}


def register() -> None:
    """Entry point of `vllm.general_plugins`: names the models that carry our modules; nothing is imported yet."""
    from vllm import ModelRegistry

    for name in ARCHITECTURES.values():
        ModelRegistry.register_model(name, f"m3po_vllm.models:{name}")


def engine_arguments(
    hyperparameters: dict[str, Any],
    architecture: str,
    *,
    sampling_temperature: float = 1.0,
    every_request: bool = False,
) -> dict[str, Any]:
    """What `vllm.LLM` is given for a thinking mode, beside the model.

    Args:
        hyperparameters: the mode and its numbers, as `ThinkingSettings.hyperparameters` and `m3po.json` have them.
        architecture: of the model's `config.json`.
        sampling_temperature: of the soft thoughts where tokens are chosen greedily.
        every_request: whether requests think that do not say so, see `requests.EveryRequest`.

    Raises:
        ValueError: the model is of a family that the plugin does not know, or a request by itself has not what the
            gating function hears.
    """
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"vLLM carries no thinking inputs into a {architecture}; it does into {known}.")
    if every_request and hyperparameters.get("gating_type") == "shuffled":
        raise ValueError("gating_type='shuffled' hears the paths of another group, which a request has not.")
    return {
        "worker_cls": "m3po_vllm.worker.Worker",
        "scheduler_cls": "m3po_vllm.scheduler.Scheduler",
        "logits_processors": [f"m3po_vllm.requests:{'EveryRequest' if every_request else 'Admission'}"],
        "enable_prompt_embeds": True,
        "async_scheduling": False,
        "additional_config": {CONFIG: {**hyperparameters, "sampling_temperature": sampling_temperature}},
        "hf_overrides": {"architectures": [ARCHITECTURES[architecture]]},
    }
