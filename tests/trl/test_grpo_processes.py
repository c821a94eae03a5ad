# SPDX-License-Identifier: Apache-2.0
"""Mode m3po on two processes (gloo, CPU): whole groups in each, one gradient, one log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

FLAGS = {
    "mode": "m3po",
    "answer_start": "#",
    "ddp_backend": "gloo",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "num_iterations": 2,
    "max_steps": 3,
}


def test_two_processes_agree_with_their_rollouts_and_with_each_other(tmp_path: Path):
    runs = [{"name": "run", "kind": "llama", "flags": FLAGS}]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = [str(Path(__file__).with_name("tiny_grpo.py")), str(tmp_path / "result.pt"), json.dumps(runs)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch + program, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    first, second = (torch.load(tmp_path / f"result.pt.{rank}", weights_only=True)["run"] for rank in range(2))
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
