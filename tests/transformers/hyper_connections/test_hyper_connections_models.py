# SPDX-License-Identifier: Apache-2.0
"""Hyper-connections in NanoChat, Llama and Qwen2: start, learning, gate, decoding, saving, the other systems."""

from __future__ import annotations

import copy
import inspect
import json
import shutil

import pytest
import torch
import transformers
from reference.hyper_start import put_in_the_start_that_cannot_learn
from reference.tiny import LIVELY, left_padded, small_tokenizer, teacher_forced_logps
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, StaticCache, Trainer, TrainingArguments
from transformers.m3po.aslr.modules import attach_aslr
from transformers.m3po.hyper_connections.connections import (
    MHC_MODULES,
    parameters_without_decay,
    set_mhc_gate,
    set_mhc_gates_per_layer,
)
from transformers.m3po.hyper_connections.report import gate_effect, mixers, routing_report, verdicts
from transformers.m3po.hyper_connections.routing_gate import forward_gate

SIZES = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ON = {"mhc_enabled": True}
FAMILIES = ["NanoChat", "Llama", "Qwen2"]
KINDS = ["sinkhorn", "birkhoff"]

pytestmark = pytest.mark.usefixtures("one_thread")


def make(family, seed=0, **config):
    """A tiny seeded model in evaluation mode; with hyper-connections, its other weights are the plain one's."""
    torch.manual_seed(seed)
    plain = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**SIZES))
    if not config:
        return plain.eval()
    model = type(plain)(type(plain.config)(**{**SIZES, **config}))
    if plain.state_dict().keys() <= model.state_dict().keys():
        model.load_state_dict(plain.state_dict(), strict=False)
    return model.eval()


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def trained(family, **config):
    """A model whose hyper-connections have left their start, on purpose far: H_res mixes, nothing is symmetric."""
    model = make(family, **ON, **config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if any(part in MHC_MODULES for part in name.split(".")):
                value.add_(0.6 * torch.randn_like(value))
    return model


def gradients(model, ids=None):
    """One backward pass of the language model's loss."""
    ids = torch.randint(3, 256, (3, 12), generator=torch.Generator().manual_seed(4)) if ids is None else ids
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.item()


# --- off, and the start


def test_off_there_is_no_trace_of_it(family, tmp_path):
    model = make(family)
    assert not any("mhc" in name for name, _ in [*model.named_modules(), *model.named_parameters()])
    model.save_pretrained(tmp_path)
    assert "mhc" not in (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError, match=r"mhc_gate does nothing on a \w+ without hyper-connections.*mhc_enabled"):
        model(torch.full((1, 3), 5), mhc_gate=1.0)
    for attempt in (lambda: set_mhc_gate(model, 0.5), lambda: mixers(model)):
        with pytest.raises(ValueError, match="without hyper-connections"):
            attempt()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("streams", [1, 2, 4])
def test_the_start_computes_what_the_plain_model_does(family, kind, streams):
    plain, model = make(family), make(family, **ON, mhc_residual=kind, mhc_num_streams=streams)
    inputs = left_padded([7, 4])
    with torch.no_grad():
        expected, mine = plain(**inputs).logits, model(**inputs).logits
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)
        plain, model = plain.double(), model.double()
        keep = inputs["attention_mask"].bool()
        torch.testing.assert_close(
            model(**inputs).logits[keep], plain(**inputs).logits[keep], atol=1e-6, rtol=0
        )  # the norms of these models compute in float32
    if streams > 1:
        report = routing_report(model, inputs)["sublayers"]
        assert all(numbers["from_identity"] > 1e-3 for numbers in report.values()), "H_res is not the identity"
        assert all(numbers["stream_cosine"] < 0.999 for numbers in report.values()), "the streams differ"
    gradients(plain), gradients(model)
    own = dict(model.named_parameters())
    for name, value in plain.named_parameters():
        torch.testing.assert_close(own[name].grad, value.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_everything_gets_gradient_from_the_second_step_on_and_h_res_moves(family, kind):
    """But the last sublayer's H_res, which the mean behind it undoes, where H_res is exactly doubly stochastic."""
    model = make(family, **ON, mhc_residual=kind).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    start = routing_report(model, left_padded([7, 4]))
    assert all(numbers["from_start"] < 1e-6 for numbers in start["sublayers"].values())
    *alive, last = mixers(model).values()
    for step in range(9):
        gradients(model)
        for mixer in alive if step else ():
            assert all(part.any() for rows in (mixer.phi.grad, mixer.bias.grad) for part in rows.split(mixer.sizes))
            assert mixer.scale_bias.grad.all()
        optimizer.step()
    pre, post, routes = last.bias.grad.split(last.sizes)
    assert pre.all() and post.all() and model.model.mhc_streams.offset_bias.grad.all()
    if kind == "birkhoff":
        assert routes.abs().max() < 1e-4 * post.abs().max()
    moved = routing_report(model, left_padded([7, 4]))["sublayers"]
    assert all(moved[name]["from_start"] > 1e-4 for name in list(moved)[:-1])


def test_h_res_gets_its_gradient_at_the_second_step(family):
    model = make(family, **ON, mhc_residual="birkhoff")
    routes = [mixer.bias for mixer in mixers(model).values()][0]
    gradients(model)
    quiet = routes.grad[8:].abs().max().item()
    torch.optim.Adam(model.parameters(), lr=1e-2).step()
    gradients(model)
    assert quiet < 2e-9 and routes.grad[8:].abs().max() > 5e-9


def test_with_a_start_that_cannot_learn_h_res_gets_no_gradient_and_the_report_says_so(family):
    """The test above, from a start that cannot learn: the criterion fails, and the diagnostic flags the run."""
    model = make(family, **ON, mhc_sinkhorn_tau=0.05).train()
    for mixer in mixers(model).values():
        put_in_the_start_that_cannot_learn(mixer)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(4):
        gradients(model)
        assert not any(mixer.bias.grad[8:].any() for mixer in mixers(model).values())
        optimizer.step()
    inputs = left_padded([7, 4])
    report = {**routing_report(model, inputs), "gate_effect": gate_effect(model, inputs)}
    assert all(numbers["from_identity"] == 0 for numbers in report["sublayers"].values())
    assert report["gate_effect"] == 0
    stuck, effect = verdicts(report)
    assert stuck.startswith("H_res is the identity in 4 of 4 sublayers") and effect.startswith("gate has no effect")


# --- the gate


def test_the_gate_is_a_named_argument(family):
    model = make(family, **ON)
    for module in (model, model.model, model.model.layers[0]):
        assert "mhc_gate" in inspect.signature(module.forward).parameters


def test_gates_are_exact_at_both_ends_and_per_row_and_sublayer(family):
    model, inputs = trained(family), left_padded([7, 4, 6])

    def logits(**gate):
        with torch.no_grad():
            return model(**inputs, **gate).logits

    full, identity = logits(), logits(mhc_gate=0.0)
    assert torch.equal(logits(mhc_gate=1.0), full) and torch.equal(logits(mhc_gate=torch.ones(3, 2, 2)), full)
    assert torch.equal(logits(mhc_gate=torch.zeros(1, 1, 1)), identity)
    assert (full - identity).abs().max() > 1e-3
    gate = torch.rand(3, 2, 2)
    together = logits(mhc_gate=gate)
    for row in range(3):
        alone = logits(mhc_gate=gate[row : row + 1])[row]
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-5)
    names = list(mixers(model))
    for index, name in enumerate(names[:-1]):  # the last has no effect by construction
        one = torch.ones(1, 2, 2)
        one[0, index // 2, index % 2] = 0
        report = routing_report(model, {**inputs, "mhc_gate": one})["sublayers"]
        assert [other for other in names if report[other]["from_identity"] == 0] == [name]
        assert (logits(mhc_gate=one) - full).abs().max() > 1e-4
    with pytest.raises(ValueError, match="could mean rows or layers"):
        logits(mhc_gate=torch.ones(3))


def test_a_stored_gate_is_used_unless_one_is_given_and_is_not_saved(family, tmp_path):
    model, inputs = trained(family), left_padded([7, 4])
    keys = list(model.state_dict())
    with torch.no_grad():
        full, identity = model(**inputs).logits, model(**inputs, mhc_gate=0.0).logits
        half = model(**inputs, mhc_gate=0.5).logits
        per_layer = model(**inputs, mhc_gate=torch.tensor([[0.0, 0.0], [1.0, 1.0]])).logits
        set_mhc_gate(model, 0.0)
        assert torch.equal(model(**inputs).logits, identity)
        assert torch.equal(model(**inputs, mhc_gate=0.5).logits, half)
        set_mhc_gates_per_layer(model, [0.0, 1.0])
        assert torch.equal(model(**inputs).logits, per_layer)
        set_mhc_gates_per_layer(model, [[0.0, 0.0], [1.0, 1.0]])
        assert torch.equal(model(**inputs).logits, per_layer)
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(again(**inputs).logits, full, atol=1e-5, rtol=1e-5)
        set_mhc_gate(model, None)
        assert torch.equal(model(**inputs).logits, full)
    assert list(model.state_dict()) == keys
    for wrong in ([0.5], [0.5] * 3, torch.ones(2, 3)):
        with pytest.raises(ValueError, match="give 2 numbers or \\(2, 2\\)"):
            set_mhc_gates_per_layer(model, wrong)


def test_noise_is_drawn_per_row_in_training_only_and_stays_in_the_interval():
    model, states = trained("NanoChat", mhc_gate_noise=0.5), torch.zeros(4000, 3, 32)
    assert forward_gate(model.model, None, states) is None
    model.train()
    gate = forward_gate(model.model, 0.9, states)
    assert gate.shape == (4000, 2, 2) and gate.min() >= 0 and gate.max() <= 1
    drawn = gate[:, 0, 0] != torch.tensor(0.9)
    assert 0.45 < drawn.float().mean() < 0.55 and 0.45 < gate[drawn].mean() < 0.55
    assert torch.equal(gate, gate[:, :1, :1].expand_as(gate))
    inputs = left_padded([7, 4])
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)
    model.eval()
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)


# --- decoding and training


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_and_padding_change_nothing(family, kind):
    model, inputs = trained(family, mhc_residual=kind), left_padded([9, 6])
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
    "way",
    [
        {"do_sample": False},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    ],
    ids=["greedy", "static", "sampling", "beam", "beams"],
)
def test_generate_scores_its_tokens_as_one_forward_does(family, way):
    """With one gate for each row of two prompts: the tokens come from the model that was asked for."""
    model, inputs = trained(family), left_padded([7, 4])
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


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_gradient(family, kind):
    model = trained(family, mhc_residual=kind, mhc_gate_noise=0.5).train()
    torch.manual_seed(7)
    gradients(model)
    expected = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.gradient_checkpointing_enable()
    torch.manual_seed(7)
    gradients(model)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.grad, expected[name], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_through_inductor_it_computes_the_same_with_finite_gradients():
    model = trained("NanoChat", num_hidden_layers=1).train()
    ids = torch.randint(3, 256, (2, 8))
    loss = gradients(model, ids)
    expected = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    output = torch.compile(model, fullgraph=True)(input_ids=ids, labels=ids, use_cache=False)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(loss, abs=1e-5)
    for name, value in model.named_parameters():
        assert value.grad.isfinite().all()
        torch.testing.assert_close(value.grad, expected[name], atol=1e-5, rtol=1e-4)


# --- saving and loading


def test_save_and_load_give_the_same_logits(family, tmp_path):
    model, inputs = trained(family, mhc_residual="birkhoff", mhc_num_streams=3), left_padded([7, 4])
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["mhc_enabled"] is True and stored["mhc_num_streams"] == 3 and stored["mhc_residual"] == "birkhoff"
    assert not any("basis" in name or "gate" in name for name in load_file(tmp_path / "model.safetensors")
                   if "mhc" in name)  # fmt: skip
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_checkpoint_loads_with_its_outputs_unchanged_and_float32_modules(family, tmp_path, dtype):
    make(family).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, mhc_enabled=True)
    own = [value for name, value in model.named_parameters() if any(part in MHC_MODULES for part in name.split("."))]
    assert len(own) == 13 and all(value.dtype == torch.float32 for value in own)
    assert {value.dtype for value in model.parameters()} == {torch.float32, dtype}
    for mixer in mixers(model).values():
        assert torch.equal(mixer.bias, mixer.start_bias().float()) and not mixer.phi.any()
    inputs = left_padded([7, 4])
    with torch.no_grad():
        rounding = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits, atol=rounding, rtol=rounding)
    model.save_pretrained(tmp_path / "with")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "with", dtype=dtype)
    assert {name: value.dtype for name, value in again.named_parameters()} == {
        name: value.dtype for name, value in model.named_parameters()
    }


def test_a_checkpoint_that_lost_a_module_is_refused(tmp_path):
    trained("Llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = "model.layers.1.mhc_mlp.bias"
    save_file({name: value for name, value in weights.items() if name != lost}, tmp_path / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(ValueError, match=r"mhc_enabled=True.*layers\.1\.mhc_mlp\.bias.*hyper-connections"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, mhc_enabled=False)
    assert not any("mhc" in name for name, _ in plain.named_parameters())
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**stored, "mhc_enabled": False}))
    with pytest.raises(ValueError, match=r"does not say mhc_enabled=True"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_made_on_the_meta_device_the_start_is_still_set(family):
    """A start that only `__init__` sets would be lost."""
    with torch.device("meta"):
        model = type(make(family))(type(make(family).config)(**SIZES, **ON, mhc_residual="birkhoff"))
    model = model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "m3po_init_weights"):
            module.m3po_init_weights()
    for mixer, expected in zip(mixers(model).values(), mixers(make(family, **ON, mhc_residual="birkhoff")).values(),
                               strict=True):  # fmt: skip
        assert torch.equal(mixer.bias, expected.bias) and torch.equal(mixer.basis, expected.basis)
        assert torch.equal(mixer.scale_bias, expected.scale_bias) and not mixer.phi.any()


@pytest.mark.parametrize("flags", [{"mhc_num_streams": 5, "mhc_residual": "birkhoff"}, {"mhc_sinkhorn_tau": 0.0}])
def test_a_configuration_refuses_what_the_modules_would(family, flags):
    with pytest.raises(Exception, match=r"mhc_\w+="):
        getattr(transformers, f"{family}Config")(**SIZES, **ON, **flags)


def test_weight_decay_never_touches_biases_scales_and_offsets(family, tmp_path):
    model = make(family, **ON)
    own = parameters_without_decay(model)
    assert len(own) == 1 + 2 * 4 and all("bias" in name for name in own)
    trainer = Trainer(model=model, args=TrainingArguments(tmp_path, weight_decay=0.1, report_to=[], use_cpu=True))
    decayed, spared = trainer.create_optimizer().param_groups
    assert decayed["weight_decay"] == 0.1 and spared["weight_decay"] == 0.0
    named = dict(model.named_parameters())
    spared_ids, decayed_ids = ({id(value) for value in group["params"]} for group in (spared, decayed))
    assert {id(named[name]) for name in own} <= spared_ids
    assert all(id(named[name]) in decayed_ids for name in named if name.endswith(".phi"))


# --- the other systems


@pytest.mark.parametrize("kind", ["m3po", "hrpo", "aslr"])
@pytest.mark.parametrize("maker", ["Llama", "Qwen2"])
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


def test_a_copy_of_a_model_is_whole(family):
    model, inputs = trained(family), left_padded([7, 4])
    set_mhc_gate(model, 0.3)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(**inputs).logits, model(**inputs).logits)
