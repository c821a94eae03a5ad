# SPDX-License-Identifier: Apache-2.0
"""Hyper-connections in decoding, checkpointing and compilation, and beside thinking inputs and ASLR."""

from __future__ import annotations

import pytest
import torch
from reference.hyper_models import ON, gradients, make, trained
from reference.tiny import LIVELY, left_padded, small_tokenizer, teacher_forced_logps
from transformers import StaticCache
from transformers.m3po.aslr.modules import attach_aslr

pytestmark = pytest.mark.usefixtures("one_thread")


# --- decoding and training


@pytest.mark.parametrize(
    ("architecture", "kind"), [("NanoChat", "sinkhorn"), ("Llama", "birkhoff"), ("Qwen2", "sinkhorn")]
)
def test_a_cache_and_padding_change_nothing(architecture, kind):
    model, inputs = trained(architecture, mhc_residual=kind), left_padded([9, 6])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        whole = model(**inputs, position_ids=positions, mhc_gate=0.7).logits
        first = model(ids[:, :5], attention_mask=mask[:, :5], position_ids=positions[:, :5], mhc_gate=0.7)
        rest = model(ids[:, 5:], attention_mask=mask, position_ids=positions[:, 5:], mhc_gate=0.7,
                     past_key_values=first.past_key_values)  # fmt: skip
        torch.testing.assert_close(rest.logits, whole[:, 5:], atol=1e-5, rtol=1e-5)
        alone = model(ids[1:, 3:], mhc_gate=0.7).logits
        torch.testing.assert_close(alone[0], whole[1, 3:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "way"),
    [
        ("NanoChat", {"do_sample": False}),
        ("NanoChat", {"do_sample": False, "num_beams": 3, "num_return_sequences": 2}),
        ("Llama", {"do_sample": False, "cache_implementation": "static"}),
        ("Llama", {"do_sample": False, "num_beams": 3}),
        ("Qwen2", {"do_sample": True, "num_return_sequences": 3}),
    ],
    ids=["greedy", "beams", "static", "beam", "sampling"],
)
def test_generate_scores_its_tokens_as_one_forward_does(architecture, way):
    """With one gate for each row of two prompts: the tokens come from the model that was asked for."""
    model, inputs = trained(architecture), left_padded([7, 4])
    gate = torch.tensor([0.0, 0.8])[:, None, None]
    more = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "return_dict_in_generate": True,
        "output_logits": True,
        "output_scores": True,
    }
    outputs = {}
    for name, given in {"rows": gate, "whole": torch.tensor(0.8), "layers": torch.full((1, 2, 2), 0.8)}.items():
        torch.manual_seed(3)
        outputs[name] = model.generate(**inputs, **way, **more, mhc_gate=given)
    assert torch.equal(outputs["whole"].sequences, outputs["layers"].sequences)
    if way.get("num_beams"):
        beams = outputs["rows"]
        for row in range(2):  # a row of a batch is searched as it is alone
            alone = model.generate(inputs["input_ids"][row : row + 1], mhc_gate=gate[row].item(), **way, **more,
                                   attention_mask=inputs["attention_mask"][row : row + 1])  # fmt: skip
            count = way.get("num_return_sequences", 1)
            mine = beams.sequences_scores[row * count : (row + 1) * count]
            torch.testing.assert_close(mine, alone.sequences_scores, atol=1e-4, rtol=1e-4)
        return
    sequences = outputs["rows"].sequences
    repeats = len(sequences) // 2
    rows = gate.repeat_interleave(repeats, dim=0)
    expected = teacher_forced_logps(model, sequences, inputs["attention_mask"], mhc_gate=rows)
    logits = torch.stack(outputs["rows"].logits, dim=1).log_softmax(-1)
    mine = logits.gather(-1, sequences[:, -6:, None]).squeeze(-1)
    torch.testing.assert_close(mine, expected, atol=1e-4, rtol=0)
    other = teacher_forced_logps(model, sequences, inputs["attention_mask"], mhc_gate=1 - rows)
    assert (other - expected).abs().max() > 1e-3, "the test cannot tell"


def test_a_static_cache_of_ones_own():
    model, ids = trained("NanoChat"), torch.randint(3, 256, (2, 6))
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        whole = model(ids).logits
        model(ids[:, :4], past_key_values=cache)
        rest = model(ids[:, 4:], past_key_values=cache, position_ids=torch.tensor([[4, 5]])).logits
    torch.testing.assert_close(rest, whole[:, 4:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "kind"), [("NanoChat", "sinkhorn"), ("Llama", "birkhoff"), ("Qwen2", "sinkhorn")]
)
def test_gradient_checkpointing_changes_no_gradient(architecture, kind):
    model = trained(architecture, mhc_residual=kind, mhc_gate_noise=0.5).train()
    torch.manual_seed(7)
    gradients(model)
    expected = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.gradient_checkpointing_enable()
    torch.manual_seed(7)
    gradients(model)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.grad, expected[name], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("kind", ["birkhoff"])  # the other one compiles in the test below
def test_compiled_it_computes_the_same_with_finite_gradients(kind):
    model = trained("NanoChat", mhc_residual=kind).train()
    ids = torch.randint(3, 256, (2, 8))
    loss = gradients(model, ids)
    expected = {name: value.grad.clone() for name, value in model.named_parameters()}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for gate in (None, 0.5):
        model.zero_grad()
        output = compiled(input_ids=ids, labels=ids, mhc_gate=gate, use_cache=False)
        output.loss.backward()
        assert all(value.grad.isfinite().all() for value in model.parameters())
        if gate is None:
            assert output.loss.item() == pytest.approx(loss, abs=1e-5)
            for name, value in model.named_parameters():
                torch.testing.assert_close(value.grad, expected[name], atol=1e-5, rtol=1e-4)


# --- the other systems


@pytest.mark.parametrize(("maker", "kind"), [("Llama", "hrpo"), ("Qwen2", "m3po"), ("Llama", "aslr")])
def test_rollout_and_scoring_pass_agree_with_thinking_inputs_and_aslr(maker, kind):
    config = {"thinking_residual_enabled": True} if kind == "hrpo" else {}
    model = trained(maker, **LIVELY, **config)
    mode = {"m3po": {"enable_cross_path": True, "cross_path_lambda": 0.3}}.get(kind, {})
    if kind == "aslr":
        attach_aslr(model)
        with torch.no_grad():
            model.model.m3po_path_aggregator.weight_proj.weight.normal_(std=0.3)
        mode = {"is_m3po_inference": False}
    prompts = left_padded([4, 9])
    torch.manual_seed(2)
    output = model.generate(
        **prompts, **mode, tokenizer=small_tokenizer(), do_sample=True, top_k=0, num_return_sequences=3,
        max_new_tokens=10, min_new_tokens=10, return_dict_in_generate=True, output_logits=True, mhc_gate=0.6,
    )  # fmt: skip
    bags = {"mhc_gate": 0.6}
    if kind == "aslr":
        bags |= {"is_m3po_inference": False, "aslr_row_seeds": output.row_seeds}
    else:
        bags |= {"thinking_bag_ids": output.bag_ids, "thinking_bag_weights": output.bag_weights}
    expected = teacher_forced_logps(model, output.sequences, prompts["attention_mask"], **bags)
    mine = torch.stack(output.logits, dim=1).log_softmax(-1).gather(-1, output.sequences[:, -10:, None]).squeeze(-1)
    torch.testing.assert_close(mine, expected, atol=1e-4, rtol=0)
    ungated = teacher_forced_logps(model, output.sequences, prompts["attention_mask"], **{**bags, "mhc_gate": 0.0})
    assert (ungated - expected).abs().max() > 1e-3, "the test cannot tell"


def test_nanochat_refuses_the_thinking_modes():
    model = make("NanoChat", **ON)
    with pytest.raises(ValueError, match="nanochat"):
        model.generate(**left_padded([4, 9]), tokenizer=small_tokenizer(), do_sample=True, enable_cross_path=True,
                       num_return_sequences=2, max_new_tokens=3)  # fmt: skip
