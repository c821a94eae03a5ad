# SPDX-License-Identifier: Apache-2.0
"""What `generate` refuses on a model with ASLR, or with the fields of ASLR on a plain one."""

from __future__ import annotations

import pytest
import torch
from reference.aslr_rollouts import rollout
from reference.latent import with_aslr
from reference.tiny import left_padded
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.generation import ContinuousBatchingManager
from transformers.m3po import M3POGenerationState

pytestmark = pytest.mark.usefixtures("one_thread")


# --- what is refused


@pytest.fixture
def no_manager(monkeypatch):
    """A call that is not refused must not begin continuous batching: its warm-up and threads take minutes."""

    def started(*args, **kwargs):
        raise AssertionError("continuous batching was started")

    monkeypatch.setattr(ContinuousBatchingManager, "__init__", started)


def refusal(model, mode="none", **overrides):
    """The message of the ValueError that the call raises, one line."""
    with pytest.raises(ValueError) as error:
        rollout(model, mode, **overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("way", ["argument", "state"])
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"aslr_num_paths": 2}, ["aslr_num_paths=2", "built for 4", "aslr_max_iterations=0"]),
        ({"aslr_num_paths": 1}, ["aslr_num_paths=1", "built for 4"]),
        ({"aslr_max_iterations": -1}, ["aslr_max_iterations=-1", "whole number from 0 on"]),
        ({"aslr_max_iterations": 1.5}, ["aslr_max_iterations=1.5", "whole number from 0 on"]),
        ({"aslr_threshold": 2}, ["aslr_threshold=2", "[0, 1]"]),
        ({"aslr_gumbel_temp": -1.0}, ["aslr_gumbel_temp=-1.0", "not 0 or a positive number"]),
        ({"aslr_cross_path_lambda": float("nan")}, ["aslr_cross_path_lambda=nan", "[0, 1]"]),
        ({"aslr_cross_path_temp": 0.0}, ["aslr_cross_path_temp=0.0", "not above 0"]),
    ],
)
def test_an_override_that_the_model_cannot_use_is_refused(make_for_mode, way, wrong, words):
    given = wrong if way == "argument" else {"m3po": M3POGenerationState(aslr_overrides=wrong)}
    message = refusal(with_aslr(make_for_mode()), **given)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("way", ["argument", "state"])
@pytest.mark.parametrize("name", ["aslr_num_paths", "aslr_max_iterations", "aslr_threshold"])
def test_an_override_on_a_plain_model_is_refused(make_for_mode, way, name):
    given = {name: 1} if way == "argument" else {"m3po": M3POGenerationState(aslr_overrides={name: 1})}
    message = refusal(make_for_mode(), **given)
    assert message.startswith(f"{name} does nothing on a model without ASLR") and "aslr_enabled=True" in message


def test_an_override_that_is_none_is_none(make_for_mode):
    assert torch.equal(rollout(make_for_mode(), aslr_threshold=None).sequences, rollout(make_for_mode()).sequences)
    model = with_aslr(make_for_mode())
    assert torch.equal(rollout(model, aslr_threshold=None).sequences, rollout(model).sequences)
    state = M3POGenerationState()
    assert torch.equal(rollout(model, aslr_threshold=None, m3po=state).sequences, rollout(model).sequences)


def test_an_override_beside_a_state_is_refused(make_for_mode):
    message = refusal(with_aslr(make_for_mode()), aslr_threshold=0.2, m3po=M3POGenerationState())
    assert "aslr_threshold stands beside m3po=" in message and "aslr_overrides={'aslr_threshold': 0.2}" in message


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"num_beams": 2, "do_sample": False}, "beam_search"),
        ({"num_beams": 2, "do_sample": True}, "beam_sample"),
        ({"prompt_lookup_num_tokens": 2}, "assisted_generation"),
        ({"custom_generate": lambda model, input_ids, **kwargs: input_ids}, "a decoding loop other than upstream's"),
        ({"cache_implementation": "paged"}, "continuous batching"),
    ],
)
def test_a_model_with_aslr_decodes_in_upstreams_sampling_loop_or_not_at_all(make_for_mode, no_manager, how, named):
    message = refusal(with_aslr(make_for_mode()), **how)
    assert f"a model with ASLR does not work with {named}" in message
    assert "num_beams=1" in message and "config.aslr_enabled=False" in message


@pytest.mark.parametrize("how", [{"num_beams": 2, "do_sample": False}, {"custom_generate": lambda model, input_ids: 0}])
def test_an_override_on_a_plain_model_is_refused_by_its_name_however_it_decodes(make_for_mode, how):
    assert "aslr_threshold" in refusal(make_for_mode(), aslr_threshold=0.2, **how)


@pytest.mark.parametrize("wrong", [{"aslr_num_paths": 9}, {"aslr_threshold": 2.0}])
def test_an_override_that_the_model_cannot_use_is_refused_at_inference_too(make_for_mode, wrong):
    model = with_aslr(make_for_mode())
    with pytest.raises(ValueError):
        model(torch.tensor([[5, 6]]), is_m3po_inference=True, **wrong)
    assert next(iter(wrong)) in refusal(model, is_m3po_inference=True, **wrong)


def test_a_state_refuses_an_override_that_it_does_not_know():
    with pytest.raises(ValueError, match="^aslr_overrides has aslr_treshold; it takes aslr_num_paths, "):
        M3POGenerationState(aslr_overrides={"aslr_treshold": 0.9})


def test_seeds_that_are_not_whole_numbers_are_refused(make_for_mode):
    assert "row_seeds" in refusal(with_aslr(make_for_mode()), m3po=M3POGenerationState(row_seeds=torch.rand(6)))


def test_assisted_generation_by_another_model_is_refused(make_for_mode):
    for main, assistant in (
        (with_aslr(make_for_mode()), make_for_mode(seed=1)),
        (with_aslr(make_for_mode()), with_aslr(make_for_mode(seed=1))),
    ):
        message = refusal(main, assistant_model=assistant, tokenizer=None)
        assert "a model with ASLR does not work with assisted_generation" in message


def test_continuous_batching_of_a_model_with_aslr_is_refused(make_for_mode, no_manager):
    model = with_aslr(make_for_mode())
    for call in (
        lambda: model.generate_batch([[5, 6, 7]], generation_config=GenerationConfig(max_new_tokens=2)),
        lambda: model.init_continuous_batching(GenerationConfig(max_new_tokens=2)),
    ):
        with pytest.raises(ValueError, match="a model with ASLR does not work with continuous") as error:
            call()
        assert "\n" not in str(error.value)


def test_numbers_in_a_generation_config_are_refused(make_for_mode):
    model = with_aslr(make_for_mode())
    config = GenerationConfig(aslr_max_iterations=0, max_new_tokens=2)
    with pytest.raises(ValueError, match="^aslr_max_iterations in a generation config is not read"):
        model.generate(**left_padded([4, 2, 3]), generation_config=config, is_m3po_inference=False)


def test_seeds_on_a_plain_model_are_refused(make_for_mode):
    assert "row_seeds do nothing" in refusal(make_for_mode(), m3po=M3POGenerationState(row_seeds=torch.arange(6)))


def test_an_override_of_a_loop_that_is_skipped_is_refused(make_for_mode):
    said = refusal(with_aslr(make_for_mode()), is_m3po_inference=True, aslr_threshold=0.25)
    assert "aslr_threshold does nothing with is_m3po_inference=True" in said


def test_aslr_inside_a_composite_model_is_refused():
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        aslr_enabled=True,
    )
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision = CLIPVisionConfig(image_size=8, patch_size=4, **sizes)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=63))
    with pytest.raises(ValueError, match="aslr_enabled=True in the text_config of a 'llava' model"):
        model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=1, is_m3po_inference=True)
