# SPDX-License-Identifier: Apache-2.0
"""What the patched files of TRL call, in the order a run meets it: the only module that patches name.

Each name is loaded when it is first asked for, so that `grpo_config.py` does not import what only the trainer needs.
"""

from transformers.m3po.lazy import loader

_HOMES = {
    # `GRPOConfig`: the flags, and their check when all others are settled.
    "M3POArguments": ".config",
    "check_m3po_arguments": ".checks",
    # `GRPOTrainer`, when it is made: before the adapter is laid on, at its end, and when it makes the optimizer.
    "prepare_policy": ".modules",
    "GRPORollouts": ".rollouts",  # rollout, scoring passes, loss and saves call the methods of this one
    "create_optimizer": ".optimizer",
    # `GRPOTrainer` and `VLLMGeneration`: the engine, and a rollout by it.
    "vllm_rollouts": ".vllm_rollouts",
    "make_engine": ".vllm_rollouts",
    "roll_out": ".vllm_rollouts",
}

__all__ = [*_HOMES]


__getattr__ = loader(__name__, __package__ or "", _HOMES)
