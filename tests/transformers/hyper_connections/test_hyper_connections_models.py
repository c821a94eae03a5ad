# SPDX-License-Identifier: Apache-2.0
"""Hyper-connections in NanoChat, Llama and Qwen2: start, learning, gate, saving."""

from __future__ import annotations

import copy
import inspect
import json

import pytest
import torch
import transformers
from reference.families import ARCHITECTURES
from reference.hyper_models import ON, SIZES, gradients, make, put_in_the_start_that_cannot_learn, trained
from reference.tiny import left_padded
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.m3po.hyper_connections.connections import (
    MHC_MODULES,
    parameters_without_decay,
    set_mhc_gate,
    set_mhc_gates_per_layer,
)
from transformers.m3po.hyper_connections.report import gate_effect, mixers, routing_report, verdicts
from transformers.m3po.hyper_connections.routing_gate import forward_gate

# Each has the hooks in a file of its own; what one module does is tested on the first.
EACH_ARCHITECTURE = pytest.mark.parametrize("architecture", ARCHITECTURES)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def architecture():
    return "NanoChat"


# --- off, and the start


@EACH_ARCHITECTURE
def test_off_there_is_no_trace_of_it(architecture, tmp_path):
    model = make(architecture)
    assert not any("mhc" in name for name, _ in [*model.named_modules(), *model.named_parameters()])
    model.save_pretrained(tmp_path)
    assert "mhc" not in (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError, match=r"mhc_gate does nothing on a \w+ without hyper-connections.*mhc_enabled"):
        model(torch.full((1, 3), 5), mhc_gate=1.0)
    for attempt in (lambda: set_mhc_gate(model, 0.5), lambda: mixers(model)):
        with pytest.raises(ValueError, match="without hyper-connections"):
            attempt()


@pytest.mark.parametrize(
    ("architecture", "kind", "streams"),
    [
        ("NanoChat", "sinkhorn", 4),
        ("NanoChat", "birkhoff", 1),
        ("Llama", "birkhoff", 4),
        ("Llama", "sinkhorn", 1),
        ("Qwen2", "sinkhorn", 2),
        ("Qwen2", "birkhoff", 4),
        ("Qwen3", "sinkhorn", 4),
        ("SmolLM3", "birkhoff", 4),
    ],
)
def test_the_start_computes_what_the_plain_model_does(architecture, kind, streams):
    plain, model = make(architecture), make(architecture, **ON, mhc_residual=kind, mhc_num_streams=streams)
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


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("NanoChat", "sinkhorn"), ("NanoChat", "birkhoff"), ("Llama", "birkhoff"), ("Qwen2", "sinkhorn")],
)
def test_everything_gets_gradient_from_the_second_step_on_and_h_res_moves(architecture, kind):
    """But the last sublayer's H_res, which the mean behind it undoes, where H_res is exactly doubly stochastic."""
    model = make(architecture, **ON, mhc_residual=kind).train()
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


def test_h_res_gets_its_gradient_at_the_second_step(architecture):
    model = make(architecture, **ON, mhc_residual="birkhoff")
    routes = [mixer.bias for mixer in mixers(model).values()][0]
    gradients(model)
    quiet = routes.grad[8:].abs().max().item()
    torch.optim.Adam(model.parameters(), lr=1e-2).step()
    gradients(model)
    assert quiet < 2e-9 and routes.grad[8:].abs().max() > 5e-9


def test_with_a_start_that_cannot_learn_h_res_gets_no_gradient_and_the_report_says_so(architecture):
    """The test above, from a start that cannot learn: the criterion fails, and the diagnostic flags the run."""
    model = make(architecture, **ON, mhc_sinkhorn_tau=0.05).train()
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


@EACH_ARCHITECTURE
def test_the_gate_is_a_named_argument(architecture):
    model = make(architecture, **ON)
    for module in (model, model.model, model.model.layers[0]):
        assert "mhc_gate" in inspect.signature(module.forward).parameters


@EACH_ARCHITECTURE
def test_gates_are_exact_at_both_ends_and_per_row_and_sublayer(architecture):
    model, inputs = trained(architecture), left_padded([7, 4, 6])

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


def test_a_stored_gate_is_used_unless_one_is_given_and_is_not_saved(architecture, tmp_path):
    model, inputs = trained(architecture), left_padded([7, 4])
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


# --- saving and loading


@EACH_ARCHITECTURE
def test_save_and_load_give_the_same_logits(architecture, tmp_path):
    model, inputs = trained(architecture, mhc_residual="birkhoff", mhc_num_streams=3), left_padded([7, 4])
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
@EACH_ARCHITECTURE
def test_a_plain_checkpoint_loads_with_its_outputs_unchanged_and_float32_modules(architecture, tmp_path, dtype):
    make(architecture).save_pretrained(tmp_path)
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


@EACH_ARCHITECTURE
def test_made_on_the_meta_device_the_start_is_still_set(architecture):
    """A start that only `__init__` sets would be lost."""
    with torch.device("meta"):
        model = type(make(architecture))(type(make(architecture).config)(**SIZES, **ON, mhc_residual="birkhoff"))
    model = model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "m3po_init_weights"):
            module.m3po_init_weights()
    fresh = mixers(make(architecture, **ON, mhc_residual="birkhoff"))
    for mixer, expected in zip(mixers(model).values(), fresh.values(), strict=True):
        assert torch.equal(mixer.bias, expected.bias) and torch.equal(mixer.basis, expected.basis)
        assert torch.equal(mixer.scale_bias, expected.scale_bias) and not mixer.phi.any()


@pytest.mark.parametrize("flags", [{"mhc_num_streams": 5, "mhc_residual": "birkhoff"}, {"mhc_sinkhorn_tau": 0.0}])
@EACH_ARCHITECTURE
def test_a_configuration_refuses_what_the_modules_would(architecture, flags):
    with pytest.raises(Exception, match=r"mhc_\w+="):
        getattr(transformers, f"{architecture}Config")(**SIZES, **ON, **flags)


def test_weight_decay_never_touches_biases_scales_and_offsets(architecture, tmp_path):
    model = make(architecture, **ON)
    own = parameters_without_decay(model)
    assert len(own) == 1 + 2 * 4 and all("bias" in name for name in own)
    trainer = Trainer(model=model, args=TrainingArguments(tmp_path, weight_decay=0.1, report_to=[], use_cpu=True))
    decayed, spared = trainer.create_optimizer().param_groups
    assert decayed["weight_decay"] == 0.1 and spared["weight_decay"] == 0.0
    named = dict(model.named_parameters())
    spared_ids, decayed_ids = ({id(value) for value in group["params"]} for group in (spared, decayed))
    assert {id(named[name]) for name in own} <= spared_ids
    assert all(id(named[name]) in decayed_ids for name in named if name.endswith(".phi"))


def test_a_copy_of_a_model_is_whole(architecture):
    model, inputs = trained(architecture), left_padded([7, 4])
    set_mhc_gate(model, 0.3)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(**inputs).logits, model(**inputs).logits)
