# SPDX-License-Identifier: Apache-2.0
"""Training with everything off is upstream's, and λ = 0 is the control, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.trainer.m3po.config import M3POArguments

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tests" / "trl" / "tiny_grpo.py"
SEVERAL = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "num_iterations": 2,
    "max_steps": 5,
}
RUNS = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "llama, several steps and iterations": ("llama", SEVERAL),
    "qwen2, accumulation and temperature": (
        "qwen2",
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "temperature": 0.7, "max_steps": 3},
    ),
}

WITH_THOUGHTS = ("llama, several steps and iterations", "qwen2, accumulation and temperature")


def start(result: Path, variants: dict[str, dict[str, Any]], path: str | None = None) -> subprocess.Popen:
    """Starts the runs in every variant, in a process of its own, with `path` in front of the imports.

    Every run of RUNS; in the modes with thoughts those of WITH_THOUGHTS.
    """
    runs = [
        {"name": f"{variant}: {name}", "kind": kind, "flags": {**given, **flags}}
        for variant, flags in variants.items()
        for name, (kind, given) in RUNS.items()
        if name in WITH_THOUGHTS or flags.get("mode") not in ("hrpo", "h3po")
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **({} if path is None else {"PYTHONPATH": path})}
    command = [sys.executable, str(PROGRAM), str(result), json.dumps(runs)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, result: Path) -> dict[str, Any]:
    said, _ = process.communicate()
    assert process.returncode == 0, said[-3000:]
    return torch.load(result, weights_only=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The runs as the control and at λ = 0, patched; and by the pristine upstreams, where their wheels are cached."""
    folder = tmp_path_factory.mktemp("training")
    zero = {"mode": "m3po", "cross_path_lambda": 0.0, "answer_start": "#"}
    thoughts = {"answer_start": "#", "thinking_residual_r_min": 0.3, "thinking_residual_r_max": 0.6}
    variants = {
        "none": {"mode": "none"},
        "zero": zero,
        "hrpo": {**thoughts, "mode": "hrpo"},
        "zero, thoughts": {**thoughts, "mode": "h3po", "cross_path_lambda": 0.0},
    }
    patched = start(folder / "patched.pt", variants)
    pristine = None
    if all([unpack(name, folder / "pristine") for name in ("transformers", "trl")]):
        pristine = start(folder / "pristine.pt", {"pristine": {}}, str(folder / "pristine"))
    done = {"patched": finish(patched, folder / "patched.pt")}
    if pristine is not None:
        done["pristine"] = finish(pristine, folder / "pristine.pt")
    return done


def unpack(name: str, folder: Path) -> bool:
    """Unpacks a pinned wheel of the overlay's cache; whether it was there."""
    wheels = sorted((ROOT / ".cache" / "wheels").glob(f"{name}-*.whl"))
    for wheel in wheels[-1:]:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return bool(wheels)


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours["tokens"] == theirs["tokens"]
    assert ours["losses"] == theirs["losses"]
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, weight in theirs["weights"].items():
        assert torch.equal(ours["weights"][name], weight), name
    assert torch.equal(ours["rng"], theirs["rng"])


@pytest.fixture
def pristine(results: dict[str, Any]) -> dict[str, Any]:
    """What upstream did. Both score with one plain class: upstream's only scoring function needs a GPU."""
    if "pristine" not in results:
        pytest.skip("the wheel cache does not hold the pinned upstreams; run 'make apply-patches'")
    assert results["patched"]["patched"] and not results["pristine"]["patched"]
    return results["pristine"]


@pytest.mark.parametrize("run", RUNS)
def test_lambda_zero_has_the_tokens_losses_weights_and_random_state_of_the_control(results: dict[str, Any], run: str):
    assert_same(results["patched"][f"zero: {run}"], results["patched"][f"none: {run}"])


@pytest.mark.parametrize("run", WITH_THOUGHTS)
def test_h3po_at_lambda_zero_is_hrpo(results: dict[str, Any], run: str):
    ours, plain = (results["patched"][f"{variant}: {run}"] for variant in ("hrpo", "none"))
    assert_same(results["patched"][f"zero, thoughts: {run}"], ours)
    assert sum("thinking_residual" in name for name in ours["weights"]) == 5
    assert ours["tokens"] != plain["tokens"]


@pytest.mark.parametrize("run", RUNS)
def test_mode_none_has_the_tokens_losses_weights_and_random_state_of_upstream(
    results: dict[str, Any], pristine: dict[str, Any], run: str
):
    assert_same(results["patched"][f"none: {run}"], pristine[f"pristine: {run}"])


def test_upstreams_flags_keep_their_names_order_and_defaults(results: dict[str, Any], pristine: dict[str, Any]):
    ours = {field.name for field in dataclasses.fields(M3POArguments)}
    patched = [(name, default) for name, default in results["patched"]["defaults"].items() if name not in ours]
    assert patched == list(pristine["defaults"].items())
    assert not ours & set(pristine["defaults"])


@pytest.mark.parametrize("run", RUNS)
def test_the_runs_compared_sampled_stopped_and_learned(results: dict[str, Any], run: str):
    control = results["patched"][f"none: {run}"]
    lengths = [len(ids) for ids in control["tokens"]]
    assert min(lengths) < max(lengths) and len(set(map(tuple, control["tokens"]))) > len(lengths) // 2
    assert len(set(control["losses"])) == len(control["losses"])
