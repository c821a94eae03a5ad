# SPDX-License-Identifier: Apache-2.0
"""What every test shares: no Hub, few threads, fixed seeds, and tiny models of the two architectures.

The variables are set before any test imports torch or transformers; child processes inherit them.

tests/unsloth runs in a process of its own, because importing Unsloth patches the other libraries: its tests are
collected only when asked for by path.
"""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from reference.families import FAMILIES, build

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
THREADS = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"  # two workers share two cores
os.environ.update(OFFLINE | {"OMP_NUM_THREADS": THREADS, "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg"})
os.environ.pop("M3PO_DEBUG", None)

hypothesis.settings.register_profile("m3po", derandomize=True, deadline=None, max_examples=50, database=None)
hypothesis.settings.load_profile("m3po")

# Libraries that change the process they are imported in: these folders have one of their own each. (A folder `vllm` on
# the path would be taken for the library where that is not installed.)
APART = [Path(__file__).resolve().parent / name for name in ("unsloth", "vllm_plugin")]


def asked_for(config: pytest.Config) -> list[Path | None]:
    """For each path of the command line (without one: of `testpaths`), in which folder of `APART` it lies."""
    paths = [Path(config.invocation_params.dir, argument.split("::")[0]).resolve() for argument in config.args]
    return [next((apart for apart in APART if path.is_relative_to(apart)), None) for path in paths]


def pytest_configure(config: pytest.Config) -> None:
    places = {*asked_for(config)}
    if len(places) > 1:
        apart = min(f"tests/{place.name}" for place in places if place)
        raise pytest.UsageError(f"{apart} needs a process of its own: run `pytest {apart}` by itself")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """True for a folder of `APART` where no path asks for it; None leaves the decision to pytest."""
    return True if collection_path in APART and collection_path not in asked_for(config) else None


TINY: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module", autouse=True)
def frozen_imports() -> None:
    """Keeps what the imports have made out of the garbage collection, which every `Trainer.train` runs twice.

    It is looked through object by object, which takes longer than the training of a tiny model.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Fixed seeds before every test; torch only where something has imported it already."""
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def tiny(family: str) -> Callable[..., Any]:
    """A maker of seeded float32 models in evaluation mode; keyword arguments override the tiny configuration."""

    def make(seed: int = 0, **overrides: Any) -> Any:
        import torch

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return build(family, {**TINY, **overrides}).to(torch.float32).eval()

    return make


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`family` is Llama, and every one in tests that are marked `all_families`: the patched model files."""
    if "family" in metafunc.fixturenames:
        every = metafunc.definition.get_closest_marker("all_families") is not None
        metafunc.parametrize("family", [*FAMILIES] if every else ["llama"], indirect=True)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Cases of the other families are slow ones: the inner loop has the first alone."""
    others = {*FAMILIES} - {"llama"}
    for item in items:
        values = (
            item.callspec.params.values() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
        )
        if any(isinstance(value, str) and value.lower() in others for value in values):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def family(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """As `tiny_llama`, of the family that the case is of."""
    return tiny(request.param)


@pytest.fixture
def tiny_llama() -> Callable[..., Any]:
    """`tiny_llama(seed=0, **config)`: LlamaForCausalLM, 2 layers, hidden 32, vocabulary 256, pad 0, bos 1, eos 2."""
    return tiny("llama")


@pytest.fixture
def tiny_qwen2() -> Callable[..., Any]:
    """`tiny_qwen2(seed=0, **config)`: the same sizes as `tiny_llama`, as Qwen2ForCausalLM."""
    return tiny("qwen2")
