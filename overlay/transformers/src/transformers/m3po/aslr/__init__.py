# SPDX-License-Identifier: Apache-2.0
"""ASLR: an inner loop over latent paths that refines the final hidden state."""

from ..lazy import loader

_HOMES = {
    "M3POPathAggregator": ".modules",
    "M3POPathCollaborator": ".modules",
    "M3PORouter": ".modules",
    "attach_aslr": ".modules",
}

__all__ = [*_HOMES]

__getattr__ = loader(__name__, __package__ or "", _HOMES)
