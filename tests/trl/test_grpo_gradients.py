# SPDX-License-Identifier: Apache-2.0
"""Who gets gradient, and how much: all that acts on the thinking inputs, under LoRA as well.

The residual gate starts with a decay of 0.3 to 0.6: near 1, where HRPO starts it, sqrt(1 - a²) loses in float32 the
digits that the comparison with float64 is about.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch.nn import functional as F
from transformers import TrainerCallback

GATE = {
    "thinking_residual_gate_r.weight",
    "thinking_residual_gate_r.bias",
    "thinking_residual_gate_i.weight",
    "thinking_residual_gate_i.bias",
    "thinking_residual_Lambda.Lambda",
}
MODES = [("m3po", "qwen2"), ("hrpo", "llama"), ("h3po", "llama")]


def plain_name(name: str) -> str:
    """Of a gate's parameter, with or without PEFT's wrapper around its module."""
    return name.split("model.")[-1].replace("modules_to_save.default.", "")


class Gradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step."""

    def __init__(self) -> None:
        self.first: dict[str, torch.Tensor] = {}
        self.missing: set[str] = set()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 0:
            given = dict(model.named_parameters())
            self.first = {name: value.grad.clone() for name, value in given.items() if value.grad is not None}
            self.missing = set(given) - set(self.first)


def first_step(
    tiny: Any, folder: Path, kind: str, mode: str, **given: Any
) -> tuple[Any, Gradients, dict[str, Any], torch.nn.Module]:
    """A step without gradient clipping: the trainer, its gradients, the batch of its policy pass, the model before."""
    flags = {"mode": mode, "answer_start": "#", "max_steps": 1, "max_grad_norm": 0.0, "temperature": 0.9}
    flags |= {"thinking_residual_r_min": 0.3, "thinking_residual_r_max": 0.6, "cross_path_lambda": 0.3}
    run = tiny.trainer(folder, kind, flags=flags, **given)
    before = copy.deepcopy(run.model)
    gradients = Gradients()
    run.add_callback(gradients)
    loss, batches = run._compute_loss, []
    run._compute_loss = lambda model, inputs: (batches.append(inputs), loss(model, inputs))[1]
    run.train()
    (batch,) = batches
    return run, gradients, batch, before


def dense_inputs(net: torch.nn.Module, own: torch.Tensor, thoughts: torch.Tensor) -> torch.Tensor:
    """The thinking inputs of embeddings `own` and bags' vectors `thoughts`: HRPO's formula if the model has a gate."""
    gate = {plain_name(name): value for name, value in net.named_parameters() if "original_module" not in name}
    if not GATE & gate.keys():
        return thoughts
    r, i = (
        F.linear(own, gate[f"thinking_residual_gate_{side}.weight"], gate[f"thinking_residual_gate_{side}.bias"])
        for side in "ri"
    )
    a = (-8.0 * F.softplus(-gate["thinking_residual_Lambda.Lambda"]) * r.sigmoid()).exp()
    return a * own + (1.0 - a**2 + 1e-8).sqrt() * (i.sigmoid() * thoughts)


def dense_gradients(
    net: Any, batch: dict[str, Any], temperature: float, keep_bag_graph: bool = True
) -> dict[str, torch.Tensor]:
    """The gradient of the GRPO loss in float64, from thinking inputs that are written out as dense vectors."""
    net = net.double()
    head = net.get_base_model() if hasattr(net, "get_base_model") else net
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    start = batch["prompt_ids"].size(1)
    embed, weights = head.model.embed_tokens, batch["rollout_bag_weights"].double()
    thoughts = torch.einsum("btk,btkh->bth", weights, embed(batch["rollout_bag_ids"].long()))
    if not keep_bag_graph:
        thoughts = thoughts.detach()
    inputs = embed(ids)
    own = inputs[:, start:]
    tail = torch.where(weights.sum(-1, keepdim=True) > 0, dense_inputs(net, own, thoughts), own)
    hidden = head.model(
        inputs_embeds=torch.cat([inputs[:, :start], tail], 1),
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
    ).last_hidden_state
    logps = (head.lm_head(hidden[:, start - 1 : -1]) / temperature).log_softmax(-1)
    logps = logps.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
    gain = (logps - logps.detach()).exp() * batch["advantages"].double().unsqueeze(1) * batch["completion_mask"]
    (-gain.sum() / batch["num_items_in_batch"]).backward()
    return {name: value.grad for name, value in net.named_parameters()}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(("mode", "kind"), MODES)
def test_full_fine_tuning_has_the_gradient_of_the_dense_float64_loss_through_the_bags_too(
    tiny: Any, tmp_path: Path, mode: str, kind: str
):
    run, gradients, batch, before = first_step(tiny, tmp_path, kind, mode)
    assert not gradients.missing
    assert ({plain_name(name) for name in gradients.first} >= GATE) == (mode != "m3po")
    assert not batch["rollout_bag_weights"].requires_grad and not batch["rollout_logps"].requires_grad
    expected = dense_gradients(copy.deepcopy(before), batch, run.args.temperature)
    for name, gradient in gradients.first.items():
        assert relative(gradient, expected[name]) < 1e-4, name
    embeddings = "model.embed_tokens.weight"
    cut = dense_gradients(before, batch, run.args.temperature, keep_bag_graph=False)
    assert relative(gradients.first[embeddings], cut[embeddings]) > 0.1


@pytest.mark.parametrize(("mode", "kind"), MODES)
def test_under_lora_adapters_and_gate_have_the_gradient_of_the_dense_float64_loss(
    tiny: Any, tmp_path: Path, mode: str, kind: str
):
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)  # A gets gradient at once
    run, gradients, batch, before = first_step(tiny, tmp_path, kind, mode, peft_config=adapter)
    expected = dense_gradients(before, batch, run.args.temperature)
    for name, gradient in gradients.first.items():
        assert relative(gradient, expected[name]) < 1e-4, name


@pytest.mark.parametrize(("mode", "kind"), MODES)
def test_under_lora_only_the_adapters_and_the_gate_get_gradient_and_move(
    tiny: Any, tmp_path: Path, mode: str, kind: str
):
    adapter = LoraConfig(r=4, target_modules="all-linear")
    run, gradients, _, before = first_step(tiny, tmp_path, kind, mode, peft_config=adapter)
    ours = {name for name in gradients.first if "lora_" not in name}
    assert {plain_name(name) for name in ours} == (set() if mode == "m3po" else GATE)
    assert all("lora_" not in name for name in gradients.missing)
    moving = [name for name in gradients.first if "lora_A" not in name]  # A waits for B, which starts at zero
    assert moving and all(gradients.first[name].abs().max() > 0 for name in moving)
    after = dict(run.model.named_parameters())
    moved = {name for name, value in before.named_parameters() if not torch.equal(value, after[name])}
    assert moved == set(moving)
    start = tiny.model(kind).state_dict()
    base = {name.replace(".base_layer", ""): value for name, value in run.model.get_base_model().state_dict().items()}
    assert all(torch.equal(base[name], value) for name, value in start.items())
