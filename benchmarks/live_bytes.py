# SPDX-License-Identifier: Apache-2.0
"""How many bytes of tensors were alive at once while a piece of code ran: exact, and the same at every run.

The resident memory of a process says little on a CPU: the allocator keeps what it once had, so whatever runs first is
charged for all of it. This counts the storages that operations have made and that are still referenced.
"""

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """`with LiveBytes() as memory: ...`; then `memory.peak` is the largest number of bytes alive at once.

    Counted are storages that came out of an operation inside the block; what existed before, and was only read, is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if _has_storage(leaf)}
        for leaf in tree_leaves(result):
            if _has_storage(leaf) and leaf.untyped_storage().data_ptr() not in read:  # else a view, or in place
                storage = leaf.untyped_storage()
                self._alive[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


def _has_storage(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided and leaf.device.type != "meta"
