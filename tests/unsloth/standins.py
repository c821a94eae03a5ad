# SPDX-License-Identifier: Apache-2.0
"""Unsloth's own GPU code on a CPU: test-only answers in place of a GPU's, everything else is real.

Triton's kernels run under its interpreter. What is not real here: answers to questions about the device, where tensors
lie, and the two calls that would ask a GPU or the network for statistics. Import this before Unsloth, in a process that
tests nothing else, because importing Unsloth patches the other libraries.
"""

from __future__ import annotations

import gc
import os
import sys
from types import SimpleNamespace
from typing import Any

os.environ |= {
    "UNSLOTH_ALLOW_CPU": "1",  # the device type answers "cuda"
    "TRITON_INTERPRET": "1",
    "UNSLOTH_COMPILE_DISABLE": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "HF_HUB_OFFLINE": "1",
}

import torch  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

CPU = torch.device("cpu", 0)  # with an index, by which Unsloth looks up its buffers


def _on_cpu(device: Any) -> Any:
    gpu = (isinstance(device, int) and not isinstance(device, bool)) or (
        isinstance(device, str | torch.device) and str(device).startswith("cuda")
    )
    return CPU if gpu else device


class EverythingOnTheCPU(TorchFunctionMode):
    """Turns every device argument that means a GPU into the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.device:
            first = args[0] if args else kwargs.get("type", kwargs.get("device"))
            return CPU if _on_cpu(first) is CPU else func(*args, **kwargs)
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        if func is torch.Tensor.to:
            args = (args[0], *(part if isinstance(part, torch.Tensor) else _on_cpu(part) for part in args[1:]))
        return func(*args, **kwargs)


def _answer(value: Any) -> Any:
    return lambda *args, **kwargs: value


def enter() -> None:
    """Puts the stand-ins in place and imports Unsloth; once a process."""
    if "unsloth" in sys.modules:
        return
    memory = SimpleNamespace(total_memory=24 << 30, multi_processor_count=8, name="CPU", major=9, minor=0)
    torch.cuda.device_count = _answer(1)
    torch.cuda.current_device = _answer(0)
    torch.cuda.get_device_capability = _answer((9, 0))
    torch.cuda.get_device_properties = _answer(memory)
    torch._C._cuda_getCurrentRawStream = _answer(0)
    EverythingOnTheCPU().__enter__()
    import unsloth.models.llama

    unsloth.models.llama.get_device_stats = _answer(("CPU", "", 24))
    unsloth.models.llama.get_statistics = _answer(None)
    gc.freeze()  # Unsloth collects garbage at every turn; what the imports have made need not be looked through


def generate_trainers(patch_fast_rl: Any, fast_language_model: Any) -> None:
    """Has Unsloth write its trainers from the text of TRL's, which it leaves out on what it takes for a CPU test."""
    os.environ["UNSLOTH_ALLOW_CPU"] = "0"
    try:
        patch_fast_rl(None, fast_language_model)
    finally:
        os.environ["UNSLOTH_ALLOW_CPU"] = "1"
