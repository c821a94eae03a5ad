# SPDX-License-Identifier: Apache-2.0
"""What `generate` refuses in cross-path mode, each with one line that names the flag; and what configurations save."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from reference.tiny import small_tokenizer
from transformers import GenerationConfig
from transformers.m3po import M3POGenerationState, ThinkingSettings

PROMPT = torch.full((2, 4), 130)
FIELDS = (
    "enable_cross_path",
    "cross_path_lambda",
    "cross_path_temp",
    "cross_path_phase",
    "cross_path_top_k",
    "answer_start",
    "gating_type",
    "gating_config",
    "return_thinking_embeds",
)


def refusal(model, **overrides):
    """The message of the ValueError that the call raises."""
    arguments = {
        "tokenizer": small_tokenizer(),
        "do_sample": True,
        "num_return_sequences": 2,
        "max_new_tokens": 3,
        "pad_token_id": 0,
        "enable_cross_path": True,
    }
    with pytest.raises(ValueError) as error:
        model.generate(PROMPT, **(arguments | overrides))
    message = str(error.value)
    assert "\n" not in message, message
    return message


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"cross_path_lambda": 1.2}, ["cross_path_lambda=1.2", "[0, 1]"]),
        ({"cross_path_lambda": -0.01}, ["cross_path_lambda=-0.01", "[0, 1]"]),
        ({"cross_path_lambda": float("nan")}, ["cross_path_lambda=nan", "[0, 1]"]),
        ({"cross_path_temp": 0.0}, ["cross_path_temp=0.0", "above 0"]),
        ({"cross_path_temp": -1.0}, ["cross_path_temp=-1.0", "above 0"]),
        ({"gating_config": {"temperature": 0.0}}, ["cross_path_temp=0.0", "above 0"]),
        ({"cross_path_phase": "answer"}, ["cross_path_phase='answer'", "thinking, all"]),
        ({"cross_path_top_k": 0}, ["cross_path_top_k=0", "1 or more"]),
        ({"answer_start": ""}, ["answer_start", "empty"]),
        ({"gating_type": "no_such_gate"}, ["gating_type='no_such_gate'", "baseline"]),
        ({"gating_config": {"heads": 4}}, ["gating_config", "'heads'", "'baseline'"]),
        (
            {"gating_config": {"temperature": 0.2}, "cross_path_temp": 0.1},
            ["cross_path_temp=0.1", "temperature=0.2", "contradict"],
        ),
        ({"tokenizer": None}, ["tokenizer", "'####'", "cross_path_phase='all'"]),
        ({"num_return_sequences": 1}, ["groups", "num_return_sequences", "group_ids"]),
        ({"m3po": M3POGenerationState(group_ids=torch.tensor([0, 0, 1]))}, ["group_ids has 3 entries", "4"]),
        ({"m3po": M3POGenerationState(group_ids=torch.zeros(4))}, ["group_ids must be whole numbers"]),
    ],
)
def test_a_wrong_number_is_refused_in_one_line_that_names_it(tiny_llama, wrong, words):
    message = refusal(tiny_llama(), **wrong)
    assert all(word in message for word in words), message


def test_beam_search_is_refused(tiny_llama):
    message = refusal(tiny_llama(), num_beams=2, do_sample=False)
    assert "enable_cross_path does not work with beam_search" in message and "num_beams=1" in message


@pytest.mark.parametrize("assistant", [{"prompt_lookup_num_tokens": 2}, {"assistant_model": None}])
def test_assisted_generation_is_refused(tiny_llama, assistant):
    if "assistant_model" in assistant:
        assistant = {"assistant_model": tiny_llama(seed=1), "tokenizer": None}
    message = refusal(tiny_llama(), num_return_sequences=1, **assistant)
    assert "enable_cross_path does not work with assisted_generation" in message


def test_a_decoding_loop_of_somebody_else_is_refused(tiny_llama):
    """It would run without interaction, and without a word."""

    class OwnLoop(transformers.LlamaForCausalLM):
        def _sample(self, *args, **kwargs):
            raise AssertionError("not reached")

    model = tiny_llama()
    words = "enable_cross_path does not work with a decoding loop other than upstream's"
    assert words in refusal(model, custom_generate=lambda model, input_ids, **kwargs: input_ids)
    state = M3POGenerationState()
    assert words in refusal(model, enable_cross_path=None, m3po=state, custom_generate=lambda model, input_ids: 0)
    model.__class__ = OwnLoop
    assert words in refusal(model)


def test_a_callable_of_the_caller_still_gets_its_own_processing_class(tiny_llama):
    """An argument that upstream hands to the callable must not be taken for another name of `tokenizer`."""

    def loop(model, input_ids, processing_class=None, **kwargs):
        return processing_class

    assert tiny_llama().generate(PROMPT, custom_generate=loop, processing_class="mine", max_new_tokens=2) == "mine"


@pytest.mark.parametrize(
    "lone", [{"cross_path_lambda": 0.5}, {"return_thinking_embeds": True}, {"gating_config": {"temperature": 0.2}}]
)
@pytest.mark.parametrize("state", [None, M3POGenerationState()])
def test_a_number_without_the_switch_is_refused_rather_than_ignored(tiny_llama, lone, state):
    message = refusal(tiny_llama(), enable_cross_path=None, m3po=state, **lone)
    assert f"{next(iter(lone))} does nothing without enable_cross_path" in message
    common = {"max_new_tokens": 2, "pad_token_id": 0, "do_sample": False}
    tiny_llama().generate(PROMPT, enable_cross_path=False, **lone, **common)  # off on purpose


def test_numbers_in_two_places_are_refused(tiny_llama):
    state = M3POGenerationState(settings=ThinkingSettings(), group_ids=torch.tensor([0, 0, 1, 1]))
    assert "leave one of them out" in refusal(tiny_llama(), m3po=state)


@pytest.fixture
def no_manager(monkeypatch):
    """A call that is not refused must not start the threads of continuous batching: it would never come back."""

    def started(*args, **kwargs):
        raise AssertionError("continuous batching was started")

    monkeypatch.setattr(transformers.generation.ContinuousBatchingManager, "__init__", started)


@pytest.mark.parametrize("where", ["argument", "model"])
def test_continuous_batching_is_refused(tiny_llama, no_manager, where):
    model, config = tiny_llama(), GenerationConfig(enable_cross_path=True, max_new_tokens=2)
    if where == "model":
        model.generation_config, config = config, None
    with pytest.raises(ValueError, match="enable_cross_path does not work with continuous batching") as error:
        model.generate_batch([[5, 6, 7]], generation_config=config)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="enable_cross_path does not work with continuous batching"):
        model.init_continuous_batching(config)


def test_the_paged_cache_is_refused(tiny_llama, no_manager):
    assert "enable_cross_path does not work with" in refusal(tiny_llama(), cache_implementation="paged")


def test_a_state_with_beam_search_is_refused_too(tiny_llama):
    message = refusal(tiny_llama(), enable_cross_path=None, m3po=M3POGenerationState(), num_beams=2, do_sample=False)
    assert "does not work with beam_search" in message


def test_an_architecture_without_the_hook_is_refused():
    config = transformers.GPT2Config(vocab_size=256, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    message = refusal(transformers.GPT2LMHeadModel(config).eval())
    assert all(
        word in message
        for word in ("enable_cross_path", "llama", "smollm3", "'gpt2'", "CONTRIBUTING.md, Add a model family")
    )


def test_an_alias_that_agrees_is_accepted():
    settings = ThinkingSettings(cross_path_temp=0.2, gating_config={"temperature": 0.2})
    assert settings.temperature == 0.2
    assert ThinkingSettings(gating_config={"temperature": 0.3}).temperature == 0.3
    assert ThinkingSettings().temperature == 0.1


def test_the_fields_are_none_and_are_not_saved_unless_set(tmp_path):
    config = GenerationConfig()
    assert all(getattr(config, name) is None for name in FIELDS)
    config.save_pretrained(tmp_path)
    saved = (tmp_path / "generation_config.json").read_text()
    assert not any(name in saved for name in (*FIELDS, "debug"))


def test_the_fields_make_the_round_trip_when_they_are_set(tmp_path):
    values = {
        "enable_cross_path": True,
        "cross_path_lambda": 0.25,
        "cross_path_temp": 0.5,
        "cross_path_phase": "all",
        "cross_path_top_k": 3,
        "answer_start": "A:",
        "gating_type": "baseline",
        "gating_config": {"temperature": 0.5},
        "return_thinking_embeds": True,
    }
    GenerationConfig(**values).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()).items() >= values.items()
    read = GenerationConfig.from_pretrained(tmp_path)
    assert {name: getattr(read, name) for name in FIELDS} == values


def test_a_config_that_was_read_back_generates_as_the_arguments_do(tiny_llama, tmp_path):
    model = tiny_llama(initializer_range=0.25)
    numbers = {"enable_cross_path": True, "cross_path_lambda": 0.5, "cross_path_phase": "all"}
    sampling = {"do_sample": True, "num_return_sequences": 4, "max_new_tokens": 12, "pad_token_id": 0}
    GenerationConfig(**numbers, **sampling, eos_token_id=2).save_pretrained(tmp_path)
    torch.manual_seed(0)
    read = model.generate(PROMPT, generation_config=GenerationConfig.from_pretrained(tmp_path))
    torch.manual_seed(0)
    given = model.generate(PROMPT, **numbers, **sampling)
    torch.manual_seed(0)
    plain = model.generate(PROMPT, **sampling)
    assert torch.equal(read, given) and not torch.equal(read, plain)


def test_one_state_serves_one_call_after_the_other_with_the_numbers_of_each(tiny_llama):
    model, state = tiny_llama(initializer_range=0.25), M3POGenerationState()
    common = {"num_return_sequences": 2, "max_new_tokens": 6, "do_sample": True, "pad_token_id": 0}
    common["eos_token_id"] = None
    for share in (0.5, 0.25):
        model.generate(
            PROMPT, m3po=state, enable_cross_path=True, cross_path_phase="all", cross_path_lambda=share, **common
        )
        torch.testing.assert_close(state.bag_weights[:, 0, 0], torch.full((4,), 1 - share))
    model.generate(PROMPT, m3po=state, **common)
    assert state.bag_weights is None and state.rollout_logps.shape == (4, 6)


def test_the_tokenizer_may_be_given_as_processing_class(tiny_llama):
    arguments = {"num_return_sequences": 2, "max_new_tokens": 3, "do_sample": True, "return_dict_in_generate": True}
    output = tiny_llama().generate(PROMPT, processing_class=small_tokenizer(), enable_cross_path=True, **arguments)
    assert output.thinking_mask.shape == (4, 3)
