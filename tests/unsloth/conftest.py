# SPDX-License-Identifier: Apache-2.0
"""Unsloth's real patched functions on tiny models: the stand-ins of `standins.py`, its generated trainer, and models.

Importing Unsloth patches the other libraries, so these tests have a process of their own (`pytest tests/unsloth`).
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).parent
CACHE = tempfile.TemporaryDirectory()  # read by Unsloth when it is imported
os.environ["UNSLOTH_COMPILE_LOCATION"] = CACHE.name


def _load(path: Path) -> ModuleType:
    """A module by its path (test folders are no packages), importable by its name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


standins = _load(HERE / "standins.py")
standins.enter()
cases = _load(HERE / "cases.py")
processes = _load(HERE / "processes.py")

import torch  # noqa: E402
from reference.threads import one_thread  # noqa: E402, F401


@pytest.fixture(scope="session", autouse=True)
def beside(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Any]]]:
    """What tests compare with, computed beside them from the first on: one process after the other."""
    jobs = {  # name -> the fixture that asks for it, the script, whether on the pristine trees
        "ours": ("results", "plain_unsloth.py", False),
        "upstream": ("results", "plain_unsloth.py", True),
        "trl": ("plain", "plain_trl.py", False),
    }
    wanted = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool:
        yield {
            name: pool.submit(processes.run, script, Path(folder) / name, pristine)
            for name, (fixture, script, pristine) in jobs.items()
            if fixture in wanted
        }
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`fast(net, **options)`: a model as Unsloth's loader gives it, from the weights of `net`."""
    from unsloth import FastLanguageModel

    def load(net: Any, **options: Any) -> Any:
        folder = tmp_path_factory.mktemp("model")
        net.save_pretrained(folder)
        words = cases.tokenizer()
        words.unk_token = words.eos_token  # else Qwen2's tokenizer class adds one, beyond the model's embeddings
        words.save_pretrained(folder)
        given = {"dtype": torch.float32, "load_in_4bit": False, "device_map": "cpu", "max_seq_length": 64} | options
        os.environ["UNSLOTH_ENABLE_FULL_FINETUNING"] = "0"  # a load with full_finetuning leaves it at 1 for the process
        return FastLanguageModel.from_pretrained(str(folder), **given)[0]

    return load


@pytest.fixture(scope="session")
def trainer_class() -> Any:
    """Unsloth's GRPOTrainer, which it writes from the text of TRL's."""
    import trl
    from unsloth import FastLanguageModel
    from unsloth.models.rl import PatchFastRL

    standins.generate_trainers(PatchFastRL, FastLanguageModel)
    assert trl.GRPOTrainer.__name__ == "UnslothGRPOTrainer"
    return trl.GRPOTrainer
