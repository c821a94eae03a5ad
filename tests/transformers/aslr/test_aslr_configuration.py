# SPDX-License-Identifier: Apache-2.0
"""The fields of ASLR on a configuration: their defaults, what is refused, what is saved."""

from __future__ import annotations

import json

import pytest
import torch
from reference.latent import (
    DEFAULTS,
    NAMES,
    ON,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    Qwen2Config,
)
from transformers.m3po.aslr.modules import attach_aslr

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config])
def test_the_fields_have_their_documented_defaults(config):
    assert config().aslr_enabled is False
    for made in (config(), config(**ON)):
        assert {name: getattr(made, name) for name in DEFAULTS} == DEFAULTS


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        *[("aslr_num_paths", value, "is no whole number from 1 on") for value in (0, -1)],
        ("aslr_max_iterations", -1, "is no whole number from 0 on"),
        *[("aslr_threshold", value, r"is outside \[0, 1\]") for value in (-0.1, 1.1, NAN, INF)],
        *[("aslr_gumbel_temp", value, "is not 0 or a positive number") for value in (-0.1, NAN, INF)],
        *[("aslr_cross_path_lambda", value, r"is outside \[0, 1\]") for value in (-0.1, 1.1, NAN, INF)],
        *[("aslr_cross_path_temp", value, "is not above 0") for value in (0, 0.0, -1.0, NAN, INF)],
    ],
)
@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config])
def test_numbers_that_aslr_cannot_run_with_are_refused_in_one_line(tiny_llama, config, name, value, rule):
    line = f"^{name}={value} {rule}; .*{DEFAULTS[name]}.$"
    for given in ({**ON, name: value}, {name: value}):
        with pytest.raises(Exception, match=name) as error:
            config(**given)
        cause = error.value.__cause__ or error.value
        assert isinstance(cause, ValueError)
        with pytest.raises(ValueError, match=line):
            raise cause
    with pytest.raises(ValueError, match=line):
        attach_aslr(tiny_llama(), **{name: value})


@pytest.mark.parametrize(("name", "value"), [("aslr_num_paths", 2.0), ("aslr_max_iterations", 1.5)])
@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config])
def test_numbers_of_paths_and_rounds_are_whole(tiny_llama, config, name, value):
    with pytest.raises(Exception, match=name):
        config(**ON, **{name: value})
    with pytest.raises(ValueError, match=f"^{name}={value} is no whole number"):
        attach_aslr(tiny_llama(), **{name: value})


@pytest.mark.all_families
def test_eight_heads_must_divide_the_hidden_size(make):
    odd = {"hidden_size": 36, "num_attention_heads": 2, "num_key_value_heads": 1}
    assert make(**odd).config.aslr_enabled is False
    for refused in (lambda: make(**odd, **ON), lambda: attach_aslr(make(**odd))):
        with pytest.raises(Exception, match="8 heads") as error:
            refused()
        cause = error.value.__cause__ or error.value
        assert isinstance(cause, ValueError) and "\n" not in str(cause)
        assert all(word in str(cause) for word in ("aslr_enabled=True", "this model has 36", "aslr_enabled=False"))


def test_a_refused_attachment_leaves_the_model_as_it_was(make):
    model = make()
    with pytest.raises(ValueError):
        attach_aslr(model, aslr_num_paths=0)
    assert model.config.aslr_enabled is False and model.config.aslr_num_paths == 4
    assert not any("m3po" in name for name in model.state_dict())


@pytest.mark.all_families
def test_on_is_saved_loaded_and_can_be_overridden(make, tmp_path):
    numbers = {"aslr_num_paths": 3, "aslr_threshold": 0.25, "aslr_gumbel_temp": 2.0, "aslr_cross_path_lambda": 1}
    model = make(**ON, **numbers)
    assert {key for key in model.state_dict() if "m3po" in key} == NAMES
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored.items() >= (ON | DEFAULTS | numbers).items()
    read = AutoConfig.from_pretrained(tmp_path)
    assert {name: getattr(read, name) for name in DEFAULTS} == DEFAULTS | numbers
    other = AutoModelForCausalLM.from_pretrained(tmp_path, aslr_threshold=0.75, aslr_max_iterations=0)
    assert (other.config.aslr_threshold, other.config.aslr_max_iterations, other.config.aslr_num_paths) == (0.75, 0, 3)


@pytest.mark.all_families
def test_off_leaves_no_trace_in_the_configuration_and_the_weights(make, tmp_path):
    model = make(aslr_threshold=0.3)
    assert not any("aslr" in key for key in (*model.config.to_dict(), *model.config.to_diff_dict()))
    assert not any("m3po" in key for key in model.state_dict())
    model.save_pretrained(tmp_path)
    assert "aslr" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("saved_once", [False, True])
def test_no_number_is_copied_into_the_generation_config(make, tmp_path, saved_once):
    """There it would win over the model's configuration ever after."""
    model = make(**ON, aslr_threshold=0.3)
    if saved_once:
        model.save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.generate(torch.tensor([[5, 6]]), max_new_tokens=1, do_sample=False, is_m3po_inference=False)
    model.save_pretrained(tmp_path)
    assert not {key for key in model.generation_config.to_dict() if "aslr" in key}
    text = (tmp_path / "generation_config.json").read_text()
    assert "aslr" not in text and "m3po" not in text


def test_the_generation_config_saves_inference_when_it_is_set(tmp_path):
    assert GenerationConfig().is_m3po_inference is None
    for value in (True, False):
        GenerationConfig(is_m3po_inference=value).save_pretrained(tmp_path)
        assert GenerationConfig.from_pretrained(tmp_path).is_m3po_inference is value


@pytest.mark.parametrize("kind", ["mistral", "gemma", "olmo", "granite", "cohere", "phi3", "qwen2_moe"])
def test_configurations_that_upstream_generates_from_these_have_no_such_fields(kind):
    config = AutoConfig.for_model(kind)
    assert not any(name.startswith("aslr") for name in (*vars(config), *dir(type(config)), *config.to_dict()))
