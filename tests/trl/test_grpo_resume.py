# SPDX-License-Identifier: Apache-2.0
"""A run that stops at a checkpoint and resumes is the uninterrupted run, bit for bit: h3po, and ASLR."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

FLAGS = {
    "answer_start": "#",
    "thinking_residual_r_min": 0.3,
    "thinking_residual_r_max": 0.6,
    "beta": 0.1,
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
}


# name: flags, and what the names of its modules have in common
RUNS = {
    "h3po": ({"mode": "h3po"}, "thinking_residual"),
    "none with ASLR": ({"mode": "none", "aslr_enabled": True}, "m3po_"),
    "m3po with ASLR": ({"mode": "m3po", "aslr_enabled": True}, "m3po_"),
}


def begin(tiny: Any, folder: Path, kind: str, name: str, flags: dict[str, Any]) -> tuple[Any, list[list[int]]]:
    """A trainer whose gate moves by much more than HRPO's rates would move it in four steps, and what it samples."""
    tokens: list[list[int]] = []

    def reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        tokens.extend(completion_ids)
        return tiny.reward(completions)

    start = folder / "start"
    if not start.is_dir():
        tiny.model().save_pretrained(start)
    rates = {"thinking_residual_gate_learning_rate": 1e-2, "thinking_residual_lambda_learning_rate": 1e-1}
    adapter = LoraConfig(r=4, target_modules="all-linear") if kind == "lora" else None
    model = type(tiny.model()).from_pretrained(start)
    given = {"model": model, "peft_config": adapter, "reward_funcs": reward}
    return tiny.trainer(folder / name, flags={**FLAGS, **rates, **flags}, **given), tokens


def state(run: Any) -> dict[str, torch.Tensor]:
    """All weights: the policy's, an adapter's, and those of the reference, whichever way it is kept."""
    weights = dict(run.model.state_dict())
    if run.ref_model is not None:
        weights |= {f"reference: {name}": value for name, value in run.ref_model.state_dict().items()}
    return {name: value.clone() for name, value in weights.items()}


@pytest.mark.parametrize(
    ("name", "kind"), [("h3po", "full"), ("h3po", "lora"), ("none with ASLR", "lora"), ("m3po with ASLR", "full")]
)
def test_a_resumed_run_has_the_weights_the_reference_and_the_log_of_the_uninterrupted_one(
    tiny: Any, tmp_path: Path, kind: str, name: str
):
    flags, ours = RUNS[name]
    whole, tokens = begin(tiny, tmp_path, kind, "whole", flags)
    start = state(whole)
    whole.train()
    torch.manual_seed(12345)
    resumed, later_tokens = begin(tiny, tmp_path, kind, "resumed", flags)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected, found = state(whole), state(resumed)
    assert expected.keys() == found.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []
    assert len(tokens) == 32 and later_tokens == tokens[16:]
    logged = {"loss", "kl", "completions/mean_length"}
    logged |= {"m3po/embeds_ratio"} if name == "h3po" else {"m3po/router_weight_mean", "m3po/latent_diversity_after"}
    for key in logged:
        assert len(tiny.logged(whole, key)) == 4 and tiny.logged(resumed, key) == tiny.logged(whole, key), key
    # The comparison is one of moved modules with those of step 0, not of two that stood still.
    modules = [name for name in start if ours in name]
    kept = [name for name in modules if any(part in name for part in ("reference: ", "original_module"))]
    assert len(modules) == 2 * len(kept) == (10 if name == "h3po" else 18)
    assert all(torch.equal(start[name], found[name]) == (name in kept) for name in modules)
