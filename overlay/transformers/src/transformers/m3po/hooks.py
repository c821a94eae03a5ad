# SPDX-License-Identifier: Apache-2.0
"""What the patched files of Transformers call, in the order a token meets it: the only module that patches name.

Each name is loaded when it is first asked for. A configuration class asks for its decorator long before torch is
wanted, so nothing here may import torch at the top. `patches/README.md` has the same list with what each hook relies
on.
"""

from .lazy import loader

_HOMES = {
    # The configuration classes, when they are defined.
    "with_m3po_fields": ".flags",
    "with_mhc_fields": ".flags",
    # The models, when they are made and when their weights are loaded.
    "add_modules": ".modules",
    "add_hyper_connections": ".hyper_connections.connections",
    "add_streams": ".hyper_connections.connections",
    "check_loaded_modules": ".modules",
    # `generate`, before it decodes.
    "pop_state": ".generation.state",
    "check_generation_mode": ".generation.checks",
    # `_sample`, before its loop; what it calls in the loop are the methods of the state that this returns.
    "begin_rollout": ".generation.state",
    "optimize_linear_layers": ".generation.linear",
    # The forward of the base model, from the token embeddings to the last norm.
    "mix_thinking_inputs": ".thinking.inputs",
    "thinking_residual": ".thinking.residual_gate",
    "pop_aslr_inputs": ".aslr.modules",
    "expand_streams": ".hyper_connections.connections",
    "read_streams": ".hyper_connections.connections",
    "write_streams": ".hyper_connections.connections",
    "attend_by_group": ".shared_prefix",
    "reduce_streams": ".hyper_connections.connections",
    "split_rows": ".shared_prefix",
    "refine_states": ".aslr.modules",
    # Classes that can be imported from the model files.
    "M3PORouter": ".aslr.modules",
    "M3POPathCollaborator": ".aslr.modules",
    "M3POPathAggregator": ".aslr.modules",
}

__all__ = [*_HOMES]


__getattr__ = loader(__name__, __package__ or "", _HOMES)
