# SPDX-License-Identifier: Apache-2.0
"""Who gets gradient: the embeddings through the bags (design 4), and under LoRA the adapters alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback


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


def first_step(tiny: Any, folder: Path, kind: str, **given: Any) -> tuple[Any, Gradients, dict[str, Any]]:
    """A step of mode m3po without gradient clipping: the trainer, its gradients and the batch of its policy pass."""
    flags = {"mode": "m3po", "answer_start": "#", "max_steps": 1, "max_grad_norm": 0.0, "temperature": 0.9}
    run = tiny.trainer(folder, kind, flags=flags, **given)
    gradients = Gradients()
    run.add_callback(gradients)
    loss, batches = run._compute_loss, []
    run._compute_loss = lambda model, inputs: (batches.append(inputs), loss(model, inputs))[1]
    run.train()
    (batch,) = batches
    return run, gradients, batch


def dense_gradients(
    net: Any, batch: dict[str, Any], temperature: float, keep_bag_graph: bool
) -> dict[str, torch.Tensor]:
    """The gradient of the GRPO loss in float64, from thinking inputs that are written out as dense vectors."""
    net = net.double()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    start = batch["prompt_ids"].size(1)
    embed, weights = net.model.embed_tokens, batch["thinking_bag_weights"].double()
    thoughts = torch.einsum("btk,btkh->bth", weights, embed(batch["thinking_bag_ids"].long()))
    if not keep_bag_graph:
        thoughts = thoughts.detach()
    inputs = embed(ids)
    tail = torch.where(weights.sum(-1, keepdim=True) > 0, thoughts, inputs[:, start:])
    hidden = net.model(
        inputs_embeds=torch.cat([inputs[:, :start], tail], 1),
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
    ).last_hidden_state
    logps = (net.lm_head(hidden[:, start - 1 : -1]) / temperature).log_softmax(-1)
    logps = logps.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
    gain = (logps - logps.detach()).exp() * batch["advantages"].double().unsqueeze(1) * batch["completion_mask"]
    (-gain.sum() / batch["num_items_in_batch"]).backward()
    return {name: value.grad for name, value in net.named_parameters()}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_full_fine_tuning_has_the_gradient_of_the_dense_float64_loss(tiny: Any, tmp_path: Path, kind: str):
    run, gradients, batch = first_step(tiny, tmp_path, kind)
    assert not gradients.missing
    expected = dense_gradients(tiny.model(kind), batch, run.args.temperature, keep_bag_graph=True)
    for name, gradient in gradients.first.items():
        assert relative(gradient, expected[name]) < 1e-4, name


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_full_fine_tuning_reaches_the_embeddings_through_the_bags(tiny: Any, tmp_path: Path, kind: str):
    run, gradients, batch = first_step(tiny, tmp_path, kind)
    name = "model.embed_tokens.weight"
    cut = dense_gradients(tiny.model(kind), batch, run.args.temperature, keep_bag_graph=False)
    assert relative(gradients.first[name], cut[name]) > 0.1


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_under_lora_only_the_adapters_get_gradient_and_move(tiny: Any, tmp_path: Path, kind: str):
    adapter = LoraConfig(r=4, target_modules="all-linear")
    run, gradients, _ = first_step(tiny, tmp_path, kind, peft_config=adapter)
    assert gradients.first and all("lora_" in name for name in gradients.first)
    assert all("lora_" not in name for name in gradients.missing)
    assert all(gradient.abs().max() > 0 for name, gradient in gradients.first.items() if "lora_B" in name)
    start = tiny.model(kind).state_dict()
    base = {name.replace(".base_layer", ""): value for name, value in run.model.get_base_model().state_dict().items()}
    assert all(torch.equal(base[name], value) for name, value in start.items())


def test_the_bags_of_a_batch_carry_no_gradient(tiny: Any, tmp_path: Path):
    _, _, batch = first_step(tiny, tmp_path, "llama")
    assert not batch["thinking_bag_weights"].requires_grad and not batch["rollout_per_token_logps"].requires_grad
