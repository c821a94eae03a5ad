# SPDX-License-Identifier: Apache-2.0
"""HRPO's residual gate on a model: its formula and gradient, its start, and how it is saved, loaded and copied."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from reference import thinking_residual
from reference.gated import PARAMETERS, STRONG, gate_parameters, reference_gate
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config
from transformers.m3po import ThinkingResidualLambda
from transformers.m3po.modules import RESIDUAL_GATE
from transformers.m3po.thinking.residual_gate import RESIDUAL_GATE_MODULES, attach_residual_gate

NAMES = {f"model.{name}" for name in PARAMETERS}
DEFAULTS = {"thinking_residual_enabled": True, "thinking_residual_r_min": 0.99, "thinking_residual_r_max": 0.999}


@pytest.fixture
def make(family):
    """Makes tiny models; `make(**STRONG)` makes one with a gate."""
    return family


def assert_computes_the_same(one, other):
    """Equal weights, but not bit for bit: where a loaded tensor lies in memory decides how its sums are split."""
    rounding = 1e-6 if one.dtype == torch.float32 else 2**-8
    torch.testing.assert_close(one, other, atol=rounding, rtol=rounding)


def thinking_logits(model, seed=0):
    """Logits of a pass with bags at the last 5 of 9 positions, one of them empty."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 256, (2, 9), generator=g)
    bag_ids = torch.randint(3, 256, (2, 5, 4), generator=g).int()
    weights = torch.rand(2, 5, 4, generator=g)
    weights[0, 1] = 0
    with torch.no_grad():
        return model(ids, thinking_bag_ids=bag_ids, thinking_bag_weights=weights).logits


def plain_logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 21).view(2, 9)).logits


def decays_at_rest(model):
    """exp(-c softplus(-Λ)): what Λ's start draws between the bounds."""
    return torch.exp(-8 * thinking_residual.softplus(-gate_parameters(model)[-1].detach().double()))


def assert_fresh(model, r_min, r_max):
    """A gate at its start, in float32; r_min and r_max up to the rounding of Λ."""
    w_r, b_r, w_i, b_i, _ = gate_parameters(model)
    assert all(p.dtype == torch.float32 for p in gate_parameters(model))
    std = model.config.initializer_range
    for weight in (w_r, w_i):  # 1,024 normal draws: the deviation of their std is 2.2 %
        assert abs(weight.std().item() / std - 1) < 0.1 and abs(weight.mean().item()) < 0.15 * std
    assert not torch.equal(w_r, w_i) and not b_r.any() and not b_i.any()
    decays = decays_at_rest(model)
    assert r_min - 1e-6 <= decays.min() and decays.max() <= r_max + 1e-6
    assert decays.max() - decays.min() > 0.7 * (r_max - r_min), "32 even draws do not lie so close"


def same_gate(one, other):
    return all(torch.equal(a, b) for a, b in zip(gate_parameters(one), gate_parameters(other), strict=True))


# --- the formula


@pytest.mark.parametrize("bounds", [(0.3, 0.6), (0.99, 0.999)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradient_are_those_of_the_reference(make, dtype, bounds):
    model = make(**STRONG | {"thinking_residual_r_min": bounds[0], "thinking_residual_r_max": bounds[1]})
    with torch.no_grad():
        for p in gate_parameters(model)[:4]:
            p.normal_(std=0.4)
    embeds, thought, pull = (torch.randn(2, 3, 32).to(dtype) for _ in range(3))
    pull_decay = torch.randn(2, 3, 32)
    mine = [embeds.clone().requires_grad_(), thought.clone().requires_grad_()]
    mixed, decay = model.model.thinking_residual(*mine)
    assert mixed.dtype == dtype and decay.dtype == torch.float32
    ((mixed * pull).float().sum() + (decay * pull_decay).sum()).backward()

    gate = reference_gate(model)
    theirs = [embeds.double().requires_grad_(), thought.double().requires_grad_()]
    both = [thinking_residual.gate(e, h, *gate) for e, h in zip(*(x.view(6, 32) for x in theirs), strict=True)]
    expected, expected_decay = (torch.stack(x).view(2, 3, 32) for x in zip(*both, strict=True))
    ((expected * pull.double()).sum() + (expected_decay * pull_decay.double()).sum()).backward()

    # 1 - a² loses what a's rounding is of it: up to 6e-8 / 2e-4 where a is near 1.
    loss = 3e-4 if bounds[0] > 0.9 else 1e-5
    last = 0.51 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0
    torch.testing.assert_close(decay.double(), expected_decay, atol=1e-6, rtol=0)
    torch.testing.assert_close(mixed.double(), expected, atol=0.3 * loss, rtol=last)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, atol=loss * float(b.grad.abs().max()), rtol=last)
    for p, reference in zip(gate_parameters(model), gate, strict=True):
        assert p.grad.dtype == torch.float32
        torch.testing.assert_close(
            p.grad.double(), reference.grad, atol=loss * float(reference.grad.abs().max()), rtol=0
        )


def test_autocast_changes_nothing(make):
    model = make(**STRONG)
    embeds, thought = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    plain = model.model.thinking_residual(embeds, thought)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = model.model.thinking_residual(embeds, thought)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.all_families
def test_a_forward_mixes_what_the_gate_mixes(make):
    """The vectors that the layers get: the gate's at a position with a bag, else the token's own."""
    model, seen = make(**STRONG), []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    thinking_logits(model)
    g = torch.Generator().manual_seed(0)
    ids, bag_ids = torch.randint(3, 256, (2, 9), generator=g), torch.randint(3, 256, (2, 5, 4), generator=g)
    weights, matrix = torch.rand(2, 5, 4, generator=g), model.get_input_embeddings().weight.detach()
    gate = reference_gate(model)
    for row, position in [(r, t) for r in range(2) for t in range(9)]:
        own, j = matrix[ids[row, position]], position - 4
        if j < 0 or (row, j) == (0, 1):
            assert torch.equal(seen[0][row, position], own)
            continue
        thought = sum(w.double() * matrix[k].double() for w, k in zip(weights[row, j], bag_ids[row, j], strict=True))
        expected, _ = thinking_residual.gate(own, thought, *gate)
        torch.testing.assert_close(seen[0][row, position].double(), expected.detach(), atol=1e-6, rtol=0)


# --- the start


@pytest.mark.parametrize("bounds", [(0.3, 0.9), (0.99, 0.999), (0.5, 0.5)])
def test_lambda_starts_evenly_between_its_bounds(bounds):
    decay = ThinkingResidualLambda(4096, *bounds)
    decay.reset_lambda_parameters(generator=torch.Generator().manual_seed(3))
    drawn = torch.empty(4096, dtype=torch.float64).uniform_(*bounds, generator=torch.Generator().manual_seed(3))
    expected = thinking_residual.initial_lambda(drawn)
    torch.testing.assert_close(decay.Lambda.detach().double(), expected, atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        start = decay(torch.ones(4096)).double()
    torch.testing.assert_close(start, drawn, atol=1e-6, rtol=0)
    # Kolmogorov and Smirnov: 4,096 even draws stay within 0.03 of the even distribution in 999 of 1,000 cases.
    even = torch.linspace(*bounds, 4096, dtype=torch.float64)
    assert (start.sort().values - even).abs().max() <= 0.03 * (bounds[1] - bounds[0]) + 1e-6
    decay.reset_lambda_parameters(0.2, 0.25)
    assert 0.2 - 1e-6 <= decay(torch.ones(4096)).min() <= decay(torch.ones(4096)).max() <= 0.25 + 1e-6


@pytest.mark.parametrize("bounds", [(0.0, 0.5), (0.9, 0.8), (0.5, 1.0), (-0.1, 0.5), (float("nan"), 0.5)])
def test_bounds_between_which_nothing_can_be_drawn_are_refused_in_one_line(bounds):
    fields = {"thinking_residual_r_min": bounds[0], "thinking_residual_r_max": bounds[1]}
    for refused in (
        lambda: LlamaConfig(thinking_residual_enabled=True, **fields),
        lambda: Qwen2Config(thinking_residual_enabled=True, **fields),
        lambda: ThinkingResidualLambda(4, *bounds),
        lambda: ThinkingResidualLambda(4, 0.5, 0.6).reset_lambda_parameters(*bounds),
    ):
        with pytest.raises(Exception, match="thinking_residual_r_min") as error:
            refused()
        line = str(error.value.__cause__ or error.value)
        assert isinstance(error.value.__cause__ or error.value, ValueError) and "\n" not in line
        assert f"r_min={bounds[0]} and thinking_residual_r_max={bounds[1]}" in line and "0.99 and 0.999" in line


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_made_with_a_gate_has_a_fresh_one_in_float32(make, dtype):
    config = make(initializer_range=0.05, **DEFAULTS).config
    assert_fresh(AutoModelForCausalLM.from_config(config, dtype=dtype), 0.99, 0.999)


# --- the configuration


@pytest.mark.parametrize("given", [{}, {"thinking_residual_r_min": 0.5}])
@pytest.mark.all_families
def test_off_leaves_no_trace_in_the_configuration_and_the_weights(make, tmp_path, given):
    model = make(**given)
    assert model.config.thinking_residual_enabled is False
    assert not any("thinking_residual" in key for key in (*model.config.to_dict(), *model.config.to_diff_dict()))
    assert not any("thinking_residual" in key for key in model.state_dict())
    model.save_pretrained(tmp_path)
    assert "thinking_residual" not in (tmp_path / "config.json").read_text()
    assert not any("thinking_residual" in key for key in load_file(tmp_path / "model.safetensors"))


@pytest.mark.all_families
def test_on_is_saved_loaded_and_can_be_overridden(make, tmp_path):
    model = make(**STRONG)
    assert {key for key in model.state_dict() if "thinking_residual" in key} == NAMES
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()).items() >= STRONG.items()
    read = AutoConfig.from_pretrained(tmp_path)
    assert {name: getattr(read, name) for name in STRONG} == STRONG
    other = AutoConfig.from_pretrained(tmp_path, thinking_residual_r_min=0.2, thinking_residual_enabled=False)
    assert (other.thinking_residual_r_min, other.thinking_residual_enabled) == (0.2, False)
    assert not any("thinking_residual" in key for key in other.to_dict())


# --- loading and saving


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.all_families
def test_a_plain_checkpoint_loads_into_a_model_with_a_fresh_gate_and_its_outputs_stay(make, tmp_path, dtype):
    make(initializer_range=0.05).to(dtype).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    fields = {"thinking_residual_enabled": True, "thinking_residual_r_min": 0.97, "thinking_residual_r_max": 0.98}
    gated = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, **fields)
    assert_fresh(gated, 0.97, 0.98)
    assert {p.dtype for name, p in gated.named_parameters() if name not in NAMES} == {dtype}
    assert torch.equal(plain_logits(gated), plain_logits(plain))
    assert not torch.equal(thinking_logits(gated), thinking_logits(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.all_families
def test_a_saved_gate_comes_back_bit_for_bit(make, tmp_path, dtype):
    """In float32 whatever the model's dtype: a Λ rounded to bfloat16 would move a by more than a step of training."""
    model = AutoModelForCausalLM.from_config(make(**STRONG).config, dtype=dtype).eval()
    model.save_pretrained(tmp_path)
    for asked in (dtype, "auto"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=asked)
        assert {p.dtype for p in gate_parameters(again)} == {torch.float32} and again.lm_head.weight.dtype == dtype
        assert same_gate(again, model)
        assert_computes_the_same(thinking_logits(again), thinking_logits(model))


@pytest.mark.parametrize("missing", sorted(NAMES))
def test_a_gate_that_lacks_a_tensor_is_refused_and_can_be_left_out(make, tmp_path, missing):
    model = make(**STRONG)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[missing]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="would be random") as error:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    words = (str(tmp_path), missing, "thinking_residual_enabled=True", "thinking_residual_enabled=False")
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, thinking_residual_enabled=False)
    assert torch.equal(plain_logits(plain), plain_logits(model)) and len(NAMES & plain.state_dict().keys()) == 0


def test_a_gate_of_another_width_is_refused_even_where_sizes_may_differ(make, tmp_path):
    make(**STRONG).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.thinking_residual_Lambda.Lambda"] = torch.zeros(16)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no model\.thinking_residual_Lambda\.Lambda"):
        AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


# --- attach, copy, pickle


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_attached_gate_depends_on_the_seed_alone_and_leaves_torchs_generator_be(make, dtype):
    first, second, third = (make(initializer_range=0.05).to(dtype) for _ in range(3))
    before, state = plain_logits(first), torch.get_rng_state()
    attach_residual_gate(first, 0.8, 0.9, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(3)
    attach_residual_gate(second, 0.8, 0.9, seed=7)
    attach_residual_gate(third.model, 0.8, 0.9, seed=8)
    assert same_gate(first, second)
    assert not any(
        torch.equal(a, b) for a, b in zip(gate_parameters(first), gate_parameters(third), strict=True) if a.any()
    )
    for model in (first, third):
        assert_fresh(model, 0.8, 0.9)
        assert model.config.thinking_residual_enabled and model.config.thinking_residual_r_max == 0.9
    assert torch.equal(plain_logits(first), before)


def test_an_attached_gate_is_saved_and_loaded_as_any_other(make, tmp_path):
    model = make()
    attach_residual_gate(model, 0.3, 0.6, seed=7)
    model.save_pretrained(tmp_path)
    assert_computes_the_same(thinking_logits(AutoModelForCausalLM.from_pretrained(tmp_path)), thinking_logits(model))


def test_copying_a_gate_makes_it_the_same_and_a_thing_of_its_own(make):
    source, target = make(seed=1, **STRONG), make(seed=2, **STRONG)
    head = target.lm_head.weight.clone()
    assert not same_gate(source, target)
    RESIDUAL_GATE.copy(source, target)
    assert same_gate(source, target) and torch.equal(target.lm_head.weight, head)
    with torch.no_grad():
        gate_parameters(source)[-1].add_(1)
    assert not same_gate(source, target)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_gated_model_can_be_copied_and_pickled(make, way):
    model = make(**STRONG)
    before = thinking_logits(model)
    twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(thinking_logits(twin), before)
    with torch.no_grad():
        gate_parameters(twin)[-1].sub_(1)
    assert not torch.equal(thinking_logits(twin), before) and torch.equal(thinking_logits(model), before)


# --- PEFT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_carries_the_trained_gate(make, tmp_path, dtype):
    def gated(seed):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype).eval()
        model.load_state_dict(weights)
        attach_residual_gate(model, 0.3, 0.6, seed)
        return model

    config, weights = make().config, make().state_dict()

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=list(RESIDUAL_GATE_MODULES))
    model = get_peft_model(gated(seed=1), lora)
    before = thinking_logits(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and "thinking_residual" in name}
    assert len(trained) == 5 and {p.dtype for p in trained.values()} == {torch.float32}
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape))
    model.eval()
    after = thinking_logits(model)
    assert (after - before).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(thinking_logits(model), before), "without its adapter a model has the gate it started with"

    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name.removeprefix("base_model.model.") for name in saved if "thinking_residual" in name} == NAMES
    again = PeftModel.from_pretrained(gated(seed=2), tmp_path / "adapter").eval()
    assert_computes_the_same(thinking_logits(again), after)

    merged = again.merge_and_unload()
    assert {type(getattr(merged.model, name)).__name__ for name in RESIDUAL_GATE_MODULES} == {
        "Linear",
        "ThinkingResidualLambda",
    }
    for name, p in trained.items():
        plain = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
        assert torch.equal(merged.get_parameter(plain), p)
    merged.save_pretrained(tmp_path / "merged")
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype)
    assert_computes_the_same(thinking_logits(stored), thinking_logits(merged))
    if dtype == torch.float32:  # merging rounds once more; in bfloat16 visibly
        torch.testing.assert_close(thinking_logits(merged), after, atol=1e-5, rtol=1e-5)
