# SPDX-License-Identifier: Apache-2.0
"""What the patched files of Transformers call, in the order a token meets it: the only module that patches name.

Each name is loaded when it is first asked for. A configuration class asks for its decorator long before torch is
wanted, so nothing here may import torch at the top. `patches/README.md` has the same list with what each hook relies
on.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    # The configuration classes, when they are defined.
    "with_m3po_fields": "model_config",
    "with_mhc_fields": "model_config",
    # The models, when they are made and when their weights are loaded.
    "add_modules": "own_modules",
    "add_hyper_connections": "hyper_connections",
    "add_streams": "hyper_connections",
    "check_loaded_modules": "own_modules",
    # `generate`, before it decodes.
    "pop_state": "state",
    "check_generation_mode": "state",
    # `_sample`, before its loop; what it calls in the loop are the methods of the state that this returns.
    "begin_rollout": "state",
    # The forward of the base model, from the token embeddings to the last norm.
    "mix_thinking_inputs": "bags",
    "thinking_residual": "residual_gate",
    "pop_aslr_inputs": "aslr",
    "expand_streams": "hyper_connections",
    "read_streams": "hyper_connections",
    "write_streams": "hyper_connections",
    "reduce_streams": "hyper_connections",
    "refine_states": "aslr",
    # Classes that can be imported from the model files.
    "M3PORouter": "aslr",
    "M3POPathCollaborator": "aslr",
    "M3POPathAggregator": "aslr",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f".{_HOMES[name]}", __package__), name)
    globals()[name] = found  # from here on it is an ordinary attribute
    return found
