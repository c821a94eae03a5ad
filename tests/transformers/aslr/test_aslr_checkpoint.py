# SPDX-License-Identifier: Apache-2.0
"""Models with ASLR: saved and loaded, attached, copied and pickled."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from reference.latent import (
    DEFAULTS,
    NAMES,
    ON,
    aslr_parameters,
    assert_computes_the_same,
    logits_of,
    randomise,
    with_aslr,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    m3po,
)
from transformers.m3po.aslr.modules import ASLR_MODULES, ASLR_PARAMETERS, attach_aslr
from transformers.m3po.modules import ASLR
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.all_families
def test_saved_modules_come_back_bit_for_bit(make, tmp_path, dtype):
    """In float32 whatever the model's dtype: a rounded unit matrix would be no start any more."""
    model = with_aslr(make().to(dtype), cross_path_lambda=0.4)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() >= NAMES
    for asked in (dtype, "auto"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=asked)
        assert {p.dtype for p in aslr_parameters(again)} == {torch.float32} and again.lm_head.weight.dtype == dtype
        assert all(torch.equal(a, b) for a, b in zip(aslr_parameters(again), aslr_parameters(model), strict=True))
        assert_computes_the_same(logits_of(again), logits_of(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.all_families
def test_a_plain_checkpoint_loads_into_a_model_with_the_modules_at_their_start(make, tmp_path, dtype):
    make(initializer_range=0.2).to(dtype).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=dtype, output_loading_info=True, **ON, aslr_num_paths=3
    )
    assert set(info["missing_keys"]) - {"lm_head.weight"} == NAMES
    fresh = with_aslr(plain, random=False, num_paths=3)
    assert {p.dtype for p in aslr_parameters(model)} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(aslr_parameters(model), aslr_parameters(fresh), strict=True))
    assert {p.dtype for name, p in model.named_parameters() if name not in NAMES} == {dtype}
    assert torch.equal(logits_of(model), logits_of(plain))
    assert all(p.requires_grad and not p.is_meta for p in aslr_parameters(model))


def test_a_base_model_without_its_head_loads_the_modules_too(make, tmp_path):
    model = with_aslr(make())
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(aslr_parameters(base), aslr_parameters(model), strict=True))
    base.save_pretrained(tmp_path / "base")
    assert set(ASLR_PARAMETERS) <= load_file(tmp_path / "base" / "model.safetensors").keys()


def rewrite(folder, change):
    """Changes the tensors of a checkpoint."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("missing", sorted(NAMES))
def test_modules_that_lack_a_tensor_are_refused_and_can_be_left_out(tiny_llama, tmp_path, missing):
    plain = tiny_llama()
    with_aslr(plain).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda weights: weights.pop(missing))
    with pytest.raises(ValueError, match="would be random") as error:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    words = (str(tmp_path), missing, "aslr_enabled=True", "aslr_enabled=False")
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)
    off = AutoModelForCausalLM.from_pretrained(tmp_path, aslr_enabled=False)
    assert_computes_the_same(logits_of(off), logits_of(plain))


@pytest.mark.parametrize("name", ["model.m3po_path_aggregator.weight", "model.m3po_router.gate.weight"])
def test_modules_of_another_shape_are_refused_even_where_sizes_may_differ(make, tmp_path, name):
    with_aslr(make()).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda weights: weights.update({name: torch.zeros(5)}))
    with pytest.raises(ValueError, match=f"no {name} of the right shape"):
        AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_another_number_of_latent_paths_than_the_checkpoint_has_is_refused(make, tmp_path):
    with_aslr(make(), num_paths=3).save_pretrained(tmp_path)
    with pytest.raises((ValueError, RuntimeError)):
        AutoModelForCausalLM.from_pretrained(tmp_path, aslr_num_paths=4)
    with pytest.raises(ValueError, match="m3po_path_aggregator.weight of the right shape"):
        AutoModelForCausalLM.from_pretrained(tmp_path, aslr_num_paths=4, ignore_mismatched_sizes=True)


@pytest.mark.all_families
def test_modules_can_be_dropped_on_purpose(make, tmp_path):
    plain = make()
    with_aslr(plain).save_pretrained(tmp_path)
    off = AutoModelForCausalLM.from_pretrained(tmp_path, aslr_enabled=False)
    assert not any("m3po" in name for name in off.state_dict()) and not off.config.aslr_enabled
    assert_computes_the_same(logits_of(off), logits_of(plain))
    off.save_pretrained(tmp_path / "off")
    assert "aslr" not in (tmp_path / "off" / "config.json").read_text()


@pytest.mark.parametrize("field", [None, False])
def test_modules_that_the_configuration_does_not_know_of_are_not_dropped_unasked(make, tmp_path, field):
    model = with_aslr(make())
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["aslr_enabled"]
    (tmp_path / "config.json").write_text(json.dumps(stored if field is None else stored | {"aslr_enabled": field}))
    for given in ({}, {"aslr_enabled": False}):
        with pytest.raises(ValueError, match="would be lost") as error:
            AutoModelForCausalLM.from_pretrained(tmp_path, **given)
        assert "\n" not in str(error.value) and "aslr_enabled=True" in str(error.value)
        assert min(NAMES) in str(error.value)
    assert_computes_the_same(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path, **ON)), logits_of(model))


# --- attach, copy, pickle


def test_attaching_changes_no_logits_and_leaves_torchs_generator_be(make):
    model = make()
    before, state = logits_of(model), torch.get_rng_state()
    attach_aslr(model, aslr_num_paths=2, aslr_threshold=0.25)
    assert torch.equal(torch.get_rng_state(), state)
    numbers = {name: getattr(model.config, name) for name in DEFAULTS}
    assert numbers == DEFAULTS | {"aslr_num_paths": 2, "aslr_threshold": 0.25} and model.config.aslr_enabled
    assert model.model.m3po_path_aggregator.weight.shape == (2,)
    assert torch.equal(logits_of(model), before)


def test_attaching_keeps_the_numbers_of_the_configuration(make):
    model = make(aslr_num_paths=2, aslr_gumbel_temp=3.0)
    attach_aslr(model.model, aslr_threshold=0.25)
    numbers = {"aslr_num_paths": 2, "aslr_gumbel_temp": 3.0, "aslr_threshold": 0.25}
    assert {name: getattr(model.config, name) for name in DEFAULTS} == DEFAULTS | numbers


def test_copying_the_modules_makes_them_the_same_and_things_of_their_own(make):
    plain = make()
    source, target = with_aslr(plain), with_aslr(plain, random=False)
    assert not torch.equal(logits_of(source), logits_of(target))
    ASLR.copy(source, target)
    after = logits_of(target)
    assert torch.equal(after, logits_of(source))
    randomise(source, seed=1)
    assert torch.equal(logits_of(target), after) and not torch.equal(logits_of(source), after)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_model_with_the_modules_can_be_copied_and_pickled(make, way):
    model = with_aslr(make())
    before = logits_of(model)
    twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(logits_of(twin), before)
    randomise(twin)
    assert not torch.equal(logits_of(twin), before) and torch.equal(logits_of(model), before)


@pytest.mark.parametrize("home", [m3po, modeling_llama, modeling_qwen2])
def test_the_classes_of_the_modules_can_be_imported_from_the_model_files(home, tiny_llama):
    classes = [home.M3PORouter, home.M3POPathCollaborator, home.M3POPathAggregator]
    base = tiny_llama(**ON).model
    assert [type(getattr(base, name)) for name in ASLR_MODULES] == classes
    states = torch.randn(2, 4, 32)
    assert torch.equal(base.m3po_router(states), torch.full((2, 4, 1), 0.5))
    assert base.m3po_path_collaborator(states, 0.1).shape == (2, 4, 32)
    assert torch.equal(base.m3po_path_aggregator(states), torch.zeros(2, 32))


def test_a_quantised_layer_is_refused(make):
    model = with_aslr(make())
    gate = model.model.m3po_router.gate
    gate.weight = torch.nn.Parameter(gate.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="was quantised to torch.int8: load the plain model quantised"):
        model(torch.ones(1, 3, dtype=torch.long), is_m3po_inference=False)


@pytest.mark.parametrize("on", [True, False])
def test_a_checkpoint_in_a_subfolder_is_judged_by_its_own_configuration(make, tmp_path, on):
    model = with_aslr(make())
    model.save_pretrained(tmp_path / "deep")
    loaded = type(model).from_pretrained(tmp_path, subfolder="deep", **({} if on else {"aslr_enabled": False}))
    assert hasattr(loaded.model, "m3po_router") == on


def test_a_state_dict_without_a_checkpoint_is_not_looked_for_elsewhere(make):
    model = make()
    config = copy.deepcopy(model.config)
    config.aslr_enabled = True
    loaded = type(model).from_pretrained(None, config=config, state_dict=model.state_dict())
    assert torch.equal(loaded.model.m3po_path_aggregator.weight_proj.weight, torch.zeros(32, 32))
