# SPDX-License-Identifier: Apache-2.0
"""vLLM's worker with a runner that thinks, on a CPU or on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.platforms import current_platform

from .runner import thinking

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as UpstreamWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as UpstreamWorker


class Worker(UpstreamWorker):
    """As vLLM's.

    Raises:
        ValueError: vLLM would take its second model runner, whose hooks are others.
    """

    def init_device(self) -> None:
        if self.use_v2_model_runner:
            raise ValueError("set VLLM_USE_V2_MODEL_RUNNER=0: thinking inputs are written by the first model runner.")
        super().init_device()
        self.model_runner: Any = thinking(type(self.model_runner))(self.vllm_config, self.device)

    def take_m3po_records(self, groups: Sequence[str]) -> tuple[Any, dict[str, float]]:
        """By `LLM.collective_rpc`: record and statistics of groups that have ended; see `Rollouts.take_records`."""
        return self.model_runner.rollouts.take_records(groups)
