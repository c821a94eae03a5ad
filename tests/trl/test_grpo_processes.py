# SPDX-License-Identifier: Apache-2.0
"""Modes m3po and h3po on two processes (gloo, CPU), DDP and FSDP2: whole groups in each, one gradient, one log.

What is replayed: the rollouts of a run of one process, of which each of two processes takes half. Two runs that sample
would draw other completions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

FLAGS = {
    "answer_start": "#",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "num_iterations": 2,
    "max_steps": 3,
}
# A step takes a whole generation batch: within it, every process shuffles its own rows.
REPLAYED = {"mode": "m3po", "answer_start": "#", "gradient_accumulation_steps": 2, "max_steps": 5}
LOSSES = ("dapo", "grpo")
ENGINES = ("ddp", "fsdp2")
MODES = ("m3po", "h3po")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def alone(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[dict[str, Any]]]]:
    """Per loss type: the file with the rollouts of a run of one process, and its log."""
    folder = tmp_path_factory.mktemp("alone")
    made = {}
    for loss in LOSSES:
        run = tiny.trainer(folder / loss, flags={**REPLAYED, "loss_type": loss})
        batches = tiny.keep_batches(run)
        run.train()
        torch.save(batches, folder / f"{loss}.pt")
        made[loss] = folder / f"{loss}.pt", run.state.log_history[:5]
    return made


@pytest.fixture(scope="module")
def both(alone: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of two processes with DDP, then with FSDP2 as our config has it: runs that sample, and replays."""
    folder = tmp_path_factory.mktemp("both")
    fsdp_config = yaml.safe_load((ROOT / "configs/accelerate/fsdp2.yaml").read_text())["fsdp_config"]
    runs = []
    for engine in ENGINES:
        given = {"kind": "llama", **({"fsdp_config": fsdp_config} if engine == "fsdp2" else {})}
        for mode in MODES:
            runs.append({"name": f"{engine}-{mode}", "flags": {**FLAGS, "mode": mode}, **given})
            given.pop("fsdp_config", None)  # it stays
        for loss in LOSSES:
            flags = {**REPLAYED, "loss_type": loss, "per_device_train_batch_size": 4}
            runs.append({"name": f"{engine}-{loss}", "flags": flags, "replay": str(alone[loss][0]), **given})
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = [str(Path(__file__).with_name("tiny_grpo.py")), str(folder / "result.pt"), json.dumps(runs)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch + program, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    return [torch.load(folder / f"result.pt.{rank}", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_agree_with_their_rollouts_and_with_each_other(
    both: list[dict[str, Any]], mode: str, engine: str
):
    first, second = (result[f"{engine}-{mode}"] for result in both)
    assert first["shared"] == (engine == "fsdp2")
    assert len(first["tokens"]) == len(second["tokens"]) == 16 and first["tokens"] != second["tokens"]
    assert all(torch.equal(weight, second["weights"][name]) for name, weight in first["weights"].items())
    ours = [
        [{key: value for key, value in entry.items() if key.startswith("m3po/")} for entry in result["log"][:3]]
        for result in (first, second)
    ]
    assert ours[0] == ours[1]
    assert [entry.get("m3po/rollout_logp_diff_max", 0) < 1e-4 for entry in ours[0]] == [True] * 3
    assert [sorted(entry) != [] for entry in ours[0]] == [True, False, True]
    assert 0 < ours[0][0]["m3po/attention_max"] <= 1
    assert (0 < ours[0][0].get("m3po/hidden_ratio", 0) < 1) == (mode == "h3po")
    assert sum("thinking_residual" in name for name in first["weights"]) == (5 if mode == "h3po" else 0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("loss", LOSSES)
def test_two_processes_train_as_one_does(both: list[dict[str, Any]], alone: dict[str, Any], loss: str, engine: str):
    """Loss and gradient norm of five steps on the same rollouts.

    Within 1e-5 of the value, or of 1 where it is smaller: sums in another order differ by some units of fp32 (6e-8),
    and five optimizer steps carry that on.
    """
    for entry, other in zip(alone[loss][1], both[0][f"{engine}-{loss}"]["log"][:5], strict=True):
        assert entry["grad_norm"] > 0.01
        for key in ("loss", "grad_norm"):
            assert other[key] == pytest.approx(entry[key], rel=1e-5, abs=1e-5), (entry["step"], key)
        assert other["m3po/rollout_logp_diff_max"] < 1e-3
