# SPDX-License-Identifier: Apache-2.0
"""What thinking does to the next token, as a run logs it, against the formula in float64 and step by step."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from trl.trainer.m3po import effect
from trl.trainer.m3po.effect import divergence, is_due, peers_differ

EVERY = {"blend_kl_steps": 1, "answer_start": "####", "max_steps": 1}


def in_float64(model: Any) -> Any:
    """A copy without what trainer and accelerate have put around its forward."""
    twin = type(model)(model.config)
    twin.load_state_dict(model.state_dict())
    return twin.double().eval()


def inputs_read(base: Any, batch: dict[str, Any], mode: str) -> torch.Tensor:
    """(B, C, H) float64: what the rollout fed in at the positions of the completions."""
    weights = batch["rollout_bag_weights"].double()
    bags = (weights.unsqueeze(-1) * base.embed_tokens(batch["rollout_bag_ids"].long())).sum(-2)
    own = base.embed_tokens(batch["completion_ids"])
    mixed = bags
    if mode != "m3po":
        decay = -8.0 * F.softplus(-base.thinking_residual_Lambda.Lambda)
        a = (decay * base.thinking_residual_gate_r(own).sigmoid()).exp()
        mixed = a * own + (1 - a**2 + 1e-8).sqrt() * base.thinking_residual_gate_i(own).sigmoid() * bags
    return torch.where(weights.sum(-1, keepdim=True) > 0, mixed, own)


def log_probs(model: Any, batch: dict[str, Any], completion: torch.Tensor) -> torch.Tensor:
    """(B, C, V) float64 of the token behind each position of the completions."""
    prompt = model.model.embed_tokens(batch["prompt_ids"])
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    logits = model(
        inputs_embeds=torch.cat([prompt, completion], 1),
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
    ).logits
    return logits[:, prompt.shape[1] :].log_softmax(-1)


@pytest.mark.parametrize("shared", ["false", "true"])
@pytest.mark.parametrize("mode", ["m3po", "hrpo", "h3po"])
def test_the_effect_is_that_of_the_formula_on_the_first_group(tiny: Any, tmp_path: Path, mode: str, shared: str):
    marker = "####" if mode == "m3po" else "##"  # with which some of the group's positions think, and have peers
    flags = {**EVERY, "mode": mode, "shared_prefix": shared, "cross_path_lambda": 0.4, "answer_start": marker}
    run = tiny.trainer(tmp_path, flags=flags)
    model, batches = in_float64(run.model), tiny.keep_batches(run)
    run.train()
    batch = {name: value[:4] for name, value in batches[0].items() if value.dim()}
    with torch.no_grad():
        read = log_probs(model, batch, inputs_read(model.model, batch, mode))
        plain = log_probs(model, batch, model.model.embed_tokens(batch["completion_ids"]))
    thinks = batch["rollout_thinking_mask"] & batch["completion_mask"].bool()
    expected = (read.exp() * (read - plain)).sum(-1)[thinks].mean().item()
    name = "blend_kl" if mode == "m3po" else "thought_kl"
    assert 0 < thinks.sum() < thinks.numel() and expected > 1e-4
    assert tiny.logged(run, f"m3po/{name}") == [pytest.approx(expected, rel=1e-3)]


def test_the_effect_of_aslr_is_that_of_leaving_it_out(tiny: Any, tmp_path: Path):
    """Its states are refined behind the last norm, of all completion tokens; the reference skips that by its flag."""
    flags = {"mode": "m3po", "aslr_enabled": True, "cross_path_lambda": 0.4, **EVERY}
    run = tiny.trainer(tmp_path, flags=flags, model=tiny.with_aslr())
    model, batches = in_float64(run.model), tiny.keep_batches(run)
    run.train()
    batch = {name: value[:4] for name, value in batches[0].items() if value.dim()}
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    arguments = {
        "input_ids": torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp_min(0),
        "thinking_bag_ids": batch["rollout_bag_ids"],
        "thinking_bag_weights": batch["rollout_bag_weights"],
    }
    with torch.no_grad():
        on, off = (
            model(**arguments, aslr_row_seeds=batch["rollout_row_seeds"], is_m3po_inference=skip).logits.log_softmax(-1)
            for skip in (False, True)
        )
    kl = (on.exp() * (on - off)).sum(-1)[:, batch["prompt_ids"].shape[1] :]
    expected = kl[batch["completion_mask"].bool()].mean().item()
    assert expected > 1e-3 and tiny.logged(run, "m3po/aslr_kl") == [pytest.approx(expected, rel=1e-3)]
    assert tiny.logged(run, "m3po/blend_kl")[0] > 1e-3


def test_blended_output_distributions_are_measured_as_such(tiny: Any, tmp_path: Path):
    flags = {"mode": "m3po", "gating_type": "luong", "gating_training": "logits", "cross_path_lambda": 0.4, **EVERY}
    run = tiny.trainer(tmp_path, flags=flags)
    run.train()
    (measured,) = tiny.logged(run, "m3po/blend_kl")
    # p' holds 0.6 of p, so that it is above it by no more than 0.4 of the rest: KL(p' || p) is finite and not 0.
    assert 1e-3 < measured < math.log(24)


def test_without_a_blend_it_is_zero(tiny: Any, tmp_path: Path):
    run = tiny.trainer(tmp_path, flags={"mode": "m3po", **EVERY, "cross_path_lambda": 0.0})
    run.train()
    assert tiny.logged(run, "m3po/blend_kl") == [0.0]


@pytest.mark.parametrize("flags", [{"mode": "m3po"}, {"mode": "h3po", "aslr_enabled": True}])
def test_a_run_is_the_same_with_and_without_measuring(tiny: Any, tmp_path: Path, flags: dict[str, Any]):
    """Bit for bit: it draws no number and leaves the model as it was."""

    def run(steps: int) -> dict[str, Any]:
        own = {**flags, "max_steps": 3, "blend_kl_steps": steps}
        return tiny.record(lambda **given: tiny.trainer(tmp_path, flags=own, **given))

    with_it, without = run(1), run(0)
    for name in ("tokens", "losses"):
        assert with_it[name] == without[name]
    assert all(torch.equal(value, without["weights"][name]) for name, value in with_it["weights"].items())


def test_long_completions_are_looked_at_in_places(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With room for five positions of four rows, the first and the last among them."""
    asked: list[torch.Tensor] = []
    run = tiny.trainer(tmp_path, flags={"mode": "m3po", "cross_path_lambda": 0.4, **EVERY})
    monkeypatch.setattr(effect, "MOST_ELEMENTS", 5 * 4 * 24)
    forward = run.model.forward

    def remember(*args: Any, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        if isinstance(logits_to_keep, torch.Tensor):
            asked.append(logits_to_keep)
        return forward(*args, logits_to_keep=logits_to_keep, **kwargs)

    run.model.forward = remember
    batches = tiny.keep_batches(run)
    run.train()
    length = batches[0]["completion_ids"].shape[1]
    first = batches[0]["prompt_ids"].shape[1]
    assert len(asked) == 2 and len(asked[0]) == 5 < length
    assert (asked[0][0], asked[0][-1]) == (first, first + length - 1)


def test_divergence_by_hand():
    p, q = torch.tensor([[[0.5, 0.5], [0.9, 0.1]]]), torch.tensor([[[0.25, 0.75], [0.5, 0.5]]])
    first = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    assert divergence(p.log(), q.log(), torch.tensor([[True, False]])).item() == pytest.approx(first)
    assert divergence(p.log(), p.log(), torch.ones(1, 2, dtype=torch.bool)).item() == 0.0
    assert math.isnan(divergence(p.log(), q.log(), torch.zeros(1, 2, dtype=torch.bool)).item())


def test_peers_differ_position_by_position():
    draws = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, (6, 9), generator=draws)
    thinks = torch.rand(6, 9, generator=draws) < 0.6
    thinks[:, 7] = False
    thinks[1:3, 8] = False  # one path of the first group is left
    found = []
    for row in range(6):
        peers = [peer for peer in range(6) if peer // 3 == row // 3 and peer != row]
        for at in range(9):
            if thinks[row, at]:
                found.append(any(thinks[peer, at] and tokens[peer, at] != tokens[row, at] for peer in peers))
    assert peers_differ(tokens, thinks, 3).item() == pytest.approx(sum(found) / len(found))
    assert 0 < sum(found) < len(found)
    assert math.isnan(peers_differ(tokens, torch.zeros_like(thinks), 3).item())


@pytest.mark.parametrize(
    ("steps", "max_steps", "per_rollout", "expected"),
    [
        (0, 8, 1, []),
        (1, 4, 1, [0, 1, 2, 3]),
        (3, 8, 1, [0, 3, 6]),
        (3, 8, 2, [0, 4, 6]),  # rollouts in steps 0, 2, 4 and 6: each first one from a multiple of three on
        (None, 24, 1, [0, 3, 6, 9, 12, 15, 18, 21]),
        (None, 4, 1, [0, 1, 2, 3]),
    ],
)
def test_when_it_is_due(steps: int | None, max_steps: int, per_rollout: int, expected: list[int]):
    args = SimpleNamespace(
        blend_kl_steps=steps, steps_per_generation=per_rollout, num_iterations=1, gradient_accumulation_steps=1
    )
    due = [
        step
        for step in range(0, max_steps, per_rollout)
        if is_due(args, SimpleNamespace(global_step=step, max_steps=max_steps))
    ]
    assert due == expected


def test_a_negative_interval_is_refused(tiny: Any, tmp_path: Path):
    with pytest.raises(ValueError, match="blend_kl_steps=-1 is below 0; 0 is never"):
        tiny.trainer(tmp_path, flags={"blend_kl_steps": -1})
