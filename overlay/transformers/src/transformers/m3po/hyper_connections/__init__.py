# SPDX-License-Identifier: Apache-2.0
"""Hyper-connections (mHC): S residual streams in place of one, and the routing gate."""

from ..lazy import loader

_HOMES = {
    "DynamicMHC": ".connections",
    "StreamOffsets": ".connections",
    "birkhoff": ".doubly_stochastic",
    "parameters_without_decay": ".connections",
    "set_mhc_gate": ".routing_gate",
    "set_mhc_gates_per_layer": ".routing_gate",
    "sinkhorn": ".doubly_stochastic",
}

__all__ = [*_HOMES]

__getattr__ = loader(__name__, __package__ or "", _HOMES)
