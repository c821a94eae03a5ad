# SPDX-License-Identifier: Apache-2.0
"""A run in mode h3po that stops at a checkpoint and resumes is the uninterrupted run, bit for bit (design 5.6)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

FLAGS = {
    "mode": "h3po",
    "answer_start": "#",
    "thinking_residual_r_min": 0.3,
    "thinking_residual_r_max": 0.6,
    "beta": 0.1,
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
}


def begin(tiny: Any, folder: Path, kind: str, name: str) -> Any:
    """A trainer whose gate moves by much more than HRPO's rates would move it in four steps."""
    start = folder / "start"
    if not start.is_dir():
        tiny.model().save_pretrained(start)
    rates = {"thinking_residual_gate_learning_rate": 1e-2, "thinking_residual_lambda_learning_rate": 1e-1}
    adapter = LoraConfig(r=4, target_modules="all-linear") if kind == "lora" else None
    model = type(tiny.model()).from_pretrained(start)
    return tiny.trainer(folder / name, flags={**FLAGS, **rates}, model=model, peft_config=adapter)


def state(run: Any) -> dict[str, torch.Tensor]:
    """All weights: the policy's, an adapter's, and those of the reference, whichever way it is kept."""
    weights = dict(run.model.state_dict())
    if run.ref_model is not None:
        weights |= {f"reference: {name}": value for name, value in run.ref_model.state_dict().items()}
    return {name: value.clone() for name, value in weights.items()}


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_resumed_run_has_the_weights_the_reference_and_the_log_of_the_uninterrupted_one(
    tiny: Any, tmp_path: Path, kind: str
):
    whole = begin(tiny, tmp_path, kind, "whole")
    start = state(whole)
    whole.train()
    torch.manual_seed(12345)
    resumed = begin(tiny, tmp_path, kind, "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected, found = state(whole), state(resumed)
    assert expected.keys() == found.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []
    for key in ("loss", "kl", "m3po/embeds_ratio", "completions/mean_length"):
        assert tiny.logged(resumed, key) == tiny.logged(whole, key), key
    # The comparison is one of moved gates with the gate of step 0, not of two that stood still.
    gate = [name for name in start if "thinking_residual" in name]
    kept = [name for name in gate if any(part in name for part in ("reference: ", "original_module"))]
    assert len(gate) == 10 and len(kept) == 5
    assert all(torch.equal(start[name], found[name]) == (name in kept) for name in gate)
