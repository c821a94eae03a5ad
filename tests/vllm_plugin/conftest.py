# SPDX-License-Identifier: Apache-2.0
"""Real engines of vLLM on tiny models, in this process, with the random numbers of a table.

vLLM takes over torch's threads, so that these tests have a process of their own (`pytest tests/vllm_plugin`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.update(
    VLLM_USE_V2_MODEL_RUNNER="0",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_CPU_CI_ENV="1",
    VLLM_LOGGING_LEVEL="ERROR",
)

sys.path.insert(0, str(Path(__file__).parent))  # for the worker's class, which vLLM imports by name
sys.path.insert(0, str(Path(__file__).parents[1] / "trl"))  # for the tiny runs of GRPO


@pytest.fixture
def engines() -> Iterator[Any]:
    """`engines(checkpoint, settings, **arguments)`: an engine with its table, shut down behind the test."""
    from vllm_engine import Engine

    made: list[Engine] = []

    def make(*args: Any, **kwargs: Any) -> Engine:
        for engine in made:
            engine.close()
        made[:] = [Engine(*args, **kwargs)]
        return made[0]

    yield make
    for engine in made:
        engine.close()
