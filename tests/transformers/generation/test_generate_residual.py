# SPDX-License-Identifier: Apache-2.0
"""`generate` on a model with a residual gate, modes hrpo and h3po: whole rollouts against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from reference import thinking_residual
from reference.gated import STRONG, assert_same_bag, bag_of, in_float64, narrow_tokenizer, reference_gate
from reference.tiny import Script, alive_after, alive_before, left_padded, teacher_forced_logps, text_of
from transformers import GenerationConfig, StaticCache
from transformers.generation import ContinuousBatchingManager
from transformers.m3po import M3POGenerateOutput, M3POGenerationState, ThinkingSettings

EOS = [2, 20]
GROUPS = [4, 4, 1, 4, 1, 9]
TEMPERATURE, LAMBDA, CROSS = 0.8, 0.4, 0.5
MODES = {"hrpo": {}, "h3po": {"enable_cross_path": True, "cross_path_lambda": LAMBDA, "cross_path_temp": CROSS}}
# Ten units of fp32 at the logits' size of 10: what a pass through two layers, and a cosine divided by 0.5, are off.
CLOSE = 1e-5


@pytest.fixture
def make(family):
    """Makes tiny models with a gate: 28 tokens, weights large enough that what is thought moves the logits."""
    return lambda **config: family(**{"vocab_size": 28, "initializer_range": 0.2, **STRONG, **config})


def rollout(model, mode, seed=1, **overrides):
    """Six left-padded prompts of several lengths, groups of three, two and one in disorder; all of it recorded."""
    arguments = {
        **left_padded([3, 6, 4, 5, 6, 2], first=3, last=28),
        "tokenizer": narrow_tokenizer(),
        "do_sample": True,
        "temperature": TEMPERATURE,
        "top_k": 0,
        "max_new_tokens": 12,
        "eos_token_id": EOS,
        "pad_token_id": 0,
        "return_thinking_embeds": True,
        "return_dict_in_generate": True,
        "output_scores": True,
        "m3po": M3POGenerationState(group_ids=torch.tensor(GROUPS)),
        **MODES[mode],
    }
    torch.manual_seed(seed)
    return model.generate(**(arguments | overrides))


def completions_of(output):
    return output.sequences[:, -output.rollout_logps.shape[1] :]


def thinking_by_the_text(tokens):
    """(B, T) bool: sampled, and no marker in the text up to and with this token."""
    texts = [[text_of(narrow_tokenizer(), row[: t + 1]) for t in range(len(row))] for row in tokens.tolist()]
    return alive_before(tokens, EOS) & ~torch.tensor([["####" in text for text in row] for row in texts])


def replay(model, output, mode, **overrides):
    """The reference's rollout of the same tokens, and the bags' positions (B, T)."""
    tokens, prompts = completions_of(output), left_padded([3, 6, 4, 5, 6, 2], first=3, last=28)
    thinking, alive = thinking_by_the_text(tokens), alive_after(tokens, EOS)
    matrix = model.get_input_embeddings().weight.detach().double()
    numbers = {"temperature": TEMPERATURE, "lambda_blend": LAMBDA, "cross_temperature": CROSS} | overrides
    with torch.no_grad():
        expected = thinking_residual.rollout_inputs(
            in_float64(model), matrix, prompts["input_ids"], prompts["attention_mask"], tokens, thinking, alive, GROUPS,
            reference_gate(model), mode=mode, **numbers,
        )  # fmt: skip
    return expected, thinking & alive


def assert_follows(model, output, expected, mixed, tolerance=CLOSE):
    """Inputs, bags and embeds_ratio of a rollout are those of the reference."""
    tokens = completions_of(output)
    matrix, gate = model.get_input_embeddings().weight.detach(), reference_gate(model)
    torch.testing.assert_close(output.thinking_embeds.double(), expected.inputs, atol=tolerance, rtol=0)
    assert torch.equal(output.thinking_embeds[~mixed], matrix[tokens[~mixed]])
    assert torch.equal(output.bag_weights.sum(-1) > 0, mixed)
    assert torch.equal(output.embeds_ratio[~mixed], torch.ones(int((~mixed).sum())))
    for row, t in mixed.nonzero().tolist():
        bag = expected.bags[row][t]
        assert_same_bag(bag_of(output.bag_ids[row, t], output.bag_weights[row, t]), bag, tolerance)
        thought = thinking_residual.bag_vector(bag, matrix)
        ratio = thinking_residual.gate(matrix[tokens[row, t]], thought, *gate)[1].mean()
        assert abs(output.embeds_ratio[row, t].item() - ratio.item()) < CLOSE


@pytest.mark.all_families
@pytest.mark.parametrize(
    ("mode", "tied", "vocabulary", "top_k"),
    [("hrpo", False, 28, 6), ("hrpo", True, 36, 6), ("h3po", True, 28, 0), ("h3po", True, 36, 6)],
)
def test_a_rollout_is_that_of_the_reference(make, mode, tied, vocabulary, top_k):
    """Inputs, bags and log-probs; then the log-probs of one teacher-forced pass, the model's and the reference's.

    28 is the size of the tokenizer; a model of 36 has rows that no token has, and samples them.
    """
    model = make(vocab_size=vocabulary, tie_word_embeddings=tied)
    output = rollout(model, mode, thought_top_k=top_k)
    tokens, steps = completions_of(output), output.rollout_logps.shape[1]
    assert output.bag_ids.shape == (6, steps, top_k or vocabulary)
    sampled, thinking = alive_before(tokens, EOS), thinking_by_the_text(tokens)
    expected, mixed = replay(model, output, mode, top_k=top_k)
    assert mixed.sum(1).unique().numel() > 2 and (sampled & ~thinking).any(), "a poor case"
    assert vocabulary == 28 or (tokens >= 28).any(), "no row beyond the tokenizer was sampled"
    assert torch.equal(output.thinking_mask, thinking)
    assert_follows(model, output, expected, mixed)
    logps = torch.where(sampled, expected.logps, 0.0)
    torch.testing.assert_close(output.rollout_logps.double(), logps, atol=CLOSE, rtol=CLOSE)

    prompts = left_padded([3, 6, 4, 5, 6, 2], first=3, last=28)
    matrix = model.get_input_embeddings().weight.detach().double()
    with torch.no_grad():
        policy = thinking_residual.policy_logps(
            in_float64(model), matrix, prompts["input_ids"], prompts["attention_mask"], tokens, expected.bags,
            reference_gate(model), temperature=TEMPERATURE,
        )  # fmt: skip
    torch.testing.assert_close(torch.where(sampled, torch.stack(policy), 0.0), logps, atol=1e-9, rtol=0)
    bags = {"thinking_bag_ids": output.bag_ids, "thinking_bag_weights": output.bag_weights}
    scored = teacher_forced_logps(model, output.sequences, prompts["attention_mask"], TEMPERATURE, **bags)
    torch.testing.assert_close(torch.where(sampled, scored, 0.0).double(), logps, atol=CLOSE, rtol=CLOSE)


def test_an_embedding_that_was_widened_later_is_read_to_its_end(make):
    model = make()
    model.resize_token_embeddings(36, mean_resizing=False)
    output = rollout(model, "h3po", thought_top_k=0)
    assert output.bag_ids.shape[-1] == 36
    assert_follows(model, output, *replay(model, output, "h3po", top_k=0))


@pytest.mark.parametrize(("mode", "where"), [("h3po", "state"), ("hrpo", "generation config"), ("h3po", "neither")])
def test_greedy_decoding_thinks_at_the_temperature_it_is_told(make, mode, where):
    """Its log-probs are those of what it chose from; its thoughts have the temperature that training sampled at."""
    model = make()
    state = M3POGenerationState(group_ids=torch.tensor(GROUPS), thought_temperature=0.5 if where == "state" else None)
    given = {"state": 0.9, "generation config": 0.5, "neither": None}[where]
    output = rollout(model, mode, do_sample=False, temperature=given, top_k=None, thought_top_k=6, m3po=state)
    tokens = completions_of(output)
    temperature = 1.0 if where == "neither" else 0.5
    expected, mixed = replay(model, output, mode, top_k=6, temperature=temperature)
    assert mixed.any()
    assert_follows(model, output, expected, mixed)
    best = torch.stack([scores.log_softmax(-1).amax(-1) for scores in output.scores], dim=1)
    assert torch.equal(tokens[:, 0], output.scores[0].argmax(-1))
    torch.testing.assert_close(output.rollout_logps, best * alive_before(tokens, EOS), atol=CLOSE, rtol=CLOSE)


def test_the_temperature_of_sampling_is_that_of_the_thoughts_and_the_states_is_not_asked(make):
    model = make()
    one = rollout(model, "hrpo", thought_top_k=6)
    state = M3POGenerationState(group_ids=torch.tensor(GROUPS), thought_temperature=0.1)
    other = rollout(model, "hrpo", thought_top_k=6, m3po=state)
    assert torch.equal(one.bag_weights, other.bag_weights) and torch.equal(one.sequences, other.sequences)
    probs = one.scores[0].softmax(-1)  # the processed scores: divided by the temperature already
    expected = probs.topk(6).values / probs.norm(dim=-1, keepdim=True)
    going = alive_after(completions_of(one), EOS)[:, :1]
    torch.testing.assert_close(one.bag_weights[:, 0], expected * going, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", list(MODES))
def test_the_object_and_the_state_hold_the_same_record(make, mode):
    state = M3POGenerationState(group_ids=torch.tensor(GROUPS))
    output = rollout(make(), mode, m3po=state)
    assert isinstance(output, M3POGenerateOutput)
    assert list(output)[:4] == ["sequences", "thinking_embeds", "thinking_mask", "embeds_ratio"]
    steps = output.sequences.shape[1] - 6
    assert output.thinking_embeds.shape == (6, steps, 32)
    assert output.thinking_mask.shape == output.embeds_ratio.shape == output.rollout_logps.shape == (6, steps)
    assert output.bag_ids.shape == output.bag_weights.shape == (6, steps, 28), "64 entries of 28 tokens"
    for name in ("bag_ids", "bag_weights", "thinking_mask", "rollout_logps"):
        assert torch.equal(getattr(state, name), getattr(output, name))
    assert type(rollout(make(), mode, return_thinking_embeds=None, return_dict_in_generate=None)) is torch.Tensor
    assert rollout(make(), mode, return_thinking_embeds=None).thinking_embeds is None


@pytest.mark.parametrize("mode", list(MODES))
def test_the_statistics_are_the_means_over_the_thoughts_that_were_read(make, mode):
    model = make()
    output = rollout(model, mode)
    mixed = output.bag_weights.sum(-1) > 0
    ratio = output.embeds_ratio[mixed].double()
    expected = {
        "embeds_ratio": ratio.mean(),
        "hidden_ratio": (1 - ratio.square()).sqrt().mean(),
        "mix_norm": output.thinking_embeds[mixed].double().norm(dim=-1).mean(),
    }
    attention = {name for name in output.statistics if name.startswith(("attention", "similarity", "active"))}
    assert output.statistics.keys() - attention == expected.keys() and len(attention) == (7 if mode == "h3po" else 0)
    for name, value in expected.items():
        torch.testing.assert_close(output.statistics[name].double(), value, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("mode", list(MODES))
def test_the_token_that_completes_the_marker_and_all_after_it_are_plain(make, mode):
    tok, model = narrow_tokenizer(), make()
    script = [
        tok.convert_tokens_to_ids(row)
        for row in (
            ["##", "1", "####", "2", "3", "4"],
            ["1", "##", "#b", "##", "##", "4"],
            ["1", "a#", "###", "2", "3", "4"],
            ["1", "2", "3", "4", "5", "6"],
            ["1", "2", "</s>", "<pad>", "<pad>", "<pad>"],
            ["#", "#", "#", "#", "4", "5"],
        )
    ]
    output = rollout(model, mode, logits_processor=[Script(script)], max_new_tokens=6, eos_token_id=2)
    assert completions_of(output).tolist() == script
    assert output.thinking_mask.long().tolist() == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
    ]
    mixed = output.thinking_mask.clone()
    mixed[4, 2] = mixed[3, 5] = False  # nothing is read after them
    assert torch.equal(output.bag_weights.sum(-1) > 0, mixed)
    own = model.get_input_embeddings()(completions_of(output))
    assert torch.equal((output.thinking_embeds != own).any(-1), mixed)


@pytest.mark.parametrize("mode", ["h3po"])
def test_phase_all_thinks_to_the_end_of_each_row_and_needs_no_tokenizer(make, mode):
    output = rollout(make(), mode, cross_path_phase="all", tokenizer=None)
    tokens = completions_of(output)
    assert torch.equal(output.thinking_mask, alive_before(tokens, EOS))
    assert torch.equal(output.bag_weights.sum(-1) > 0, alive_after(tokens, EOS))
    assert not torch.equal(output.thinking_mask, thinking_by_the_text(tokens)), "a poor case"


@pytest.mark.parametrize(("mode", "cache"), [("hrpo", "static"), ("h3po", "given"), ("h3po", "none")])
def test_every_cache_gives_the_same_rollout(make, mode, cache):
    model = make()
    arguments = {
        "static": {"cache_implementation": "static"},
        "given": {"past_key_values": StaticCache(config=model.config, max_cache_len=64)},
        "none": {"use_cache": False},
    }[cache]
    expected, output = rollout(model, mode, thought_top_k=0), rollout(model, mode, thought_top_k=0, **arguments)
    assert torch.equal(output.sequences, expected.sequences) and torch.equal(output.bag_ids, expected.bag_ids)
    for name in ("bag_weights", "rollout_logps", "thinking_embeds", "embeds_ratio"):
        torch.testing.assert_close(getattr(output, name), getattr(expected, name), atol=CLOSE, rtol=CLOSE)


def assert_same_rollout(one, other):
    for name in ("sequences", "bag_ids", "bag_weights", "rollout_logps", "thinking_embeds", "embeds_ratio"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("top_k", [0, 6])
@pytest.mark.all_families
def test_h3po_at_lambda_zero_is_hrpo_bit_for_bit(make, top_k):
    model, random_states = make(), []
    outputs = []
    for mode, flags in (("hrpo", {}), ("h3po", {"cross_path_lambda": 0.0}), ("h3po", {})):
        outputs.append(rollout(model, mode, thought_top_k=top_k, **flags))
        random_states.append(torch.get_rng_state())
    assert_same_rollout(outputs[0], outputs[1])
    assert torch.equal(random_states[0], random_states[1])
    assert not torch.equal(outputs[0].sequences, outputs[2].sequences), "the test cannot tell"


def test_groups_of_one_and_a_lone_path_among_groups_think_as_in_hrpo(make):
    model = make()
    alone = M3POGenerationState(group_ids=torch.arange(6))
    expected = rollout(model, "hrpo")
    assert_same_rollout(rollout(model, "h3po", m3po=alone), expected)
    among = rollout(model, "h3po")
    lone = GROUPS.index(9)
    length = int((expected.rollout_logps[lone] != 0).sum())
    assert length > 2
    for name in ("bag_ids", "bag_weights"):
        assert torch.equal(getattr(among, name)[lone, :length], getattr(expected, name)[lone, :length])
        assert not torch.equal(getattr(among, name)[0, 0], getattr(expected, name)[0, 0])


def test_the_mode_is_that_of_the_model_and_a_switched_off_gate_is_plain(make):
    """A gated model thinks without being asked to, as at evaluation; its configuration is what switches it off."""
    model = make()
    output = rollout(model, "hrpo", m3po=None)
    assert torch.equal(output.sequences, rollout(model, "hrpo").sequences)
    assert torch.equal(output.sequences, rollout(model, "hrpo", enable_cross_path=False).sequences)
    plain = {"return_thinking_embeds": None, "tokenizer": None, "m3po": None}
    model.config.thinking_residual_enabled = False
    off = rollout(model, "hrpo", **plain)
    bare = make(thinking_residual_enabled=False)
    bare.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(off.sequences, rollout(bare, "hrpo", **plain).sequences)
    assert not torch.equal(off.sequences, output.sequences)


# --- what is refused


@pytest.fixture
def no_manager(monkeypatch):
    """A call that is not refused must not begin continuous batching: its warm-up and threads take minutes."""

    def started(*args, **kwargs):
        raise AssertionError("continuous batching was started")

    monkeypatch.setattr(ContinuousBatchingManager, "__init__", started)


def refusal(model, mode="hrpo", **overrides):
    """The message of the ValueError that the call raises, one line."""
    with pytest.raises(ValueError) as error:
        rollout(model, mode, **({"m3po": None, "return_thinking_embeds": None} | overrides))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"tokenizer": None}, ["tokenizer=...", "'####'", "cross_path_phase='all'"]),
        ({"thought_top_k": -1}, ["thought_top_k=-1", "whole number from 0 on", "0 for the whole vocabulary"]),
        ({"thought_top_k": 2.5}, ["thought_top_k=2.5", "whole number from 0 on", "0 for the whole vocabulary"]),
        ({"answer_start": ""}, ["answer_start", "empty"]),
        ({"mode": "h3po"}, ["enable_cross_path needs groups", "num_return_sequences", "group_ids"]),
        ({"mode": "h3po", "cross_path_lambda": 1.5}, ["cross_path_lambda=1.5", "[0, 1]"]),
        (
            {"m3po": M3POGenerationState(settings=ThinkingSettings())},
            ["mode='m3po'", "with a residual", "hrpo or h3po"],
        ),
        (
            {"thought_top_k": 3, "m3po": M3POGenerationState(settings=ThinkingSettings(mode="hrpo"))},
            ["thought_top_k and m3po=", "leave one of them out"],
        ),
        ({"cross_path_lambda": 0.3}, ["cross_path_lambda does nothing without", "set enable_cross_path=True"]),
        ({"gating_type": "baseline"}, ["gating_type does nothing without", "set enable_cross_path=True"]),
        ({"cross_path_temp": 0.3, "m3po": M3POGenerationState()}, ["cross_path_temp does nothing without"]),
    ],
)
def test_a_number_that_does_not_fit_a_gated_model_is_refused(make, wrong, words):
    message = refusal(make(), **wrong)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("mode", list(MODES))
def test_a_mode_with_thoughts_is_refused_on_a_plain_model(make, mode):
    state = M3POGenerationState(settings=ThinkingSettings(mode=mode))
    message = refusal(make(thinking_residual_enabled=False), m3po=state)
    assert f"mode='{mode}'" in message and "without a residual gate" in message
    assert "set mode m3po" in message and "thinking_residual_enabled=True" in message


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_of_thoughts_that_is_not_above_0_is_refused(temperature):
    with pytest.raises(ValueError, match=f"^thought_temperature={temperature} is not above 0; set .*$"):
        M3POGenerationState(thought_temperature=temperature)


@pytest.mark.parametrize("mode", list(MODES))
def test_thought_top_k_on_a_plain_model_is_refused(make, mode):
    message = refusal(make(thinking_residual_enabled=False), mode, thought_top_k=4)
    assert message.startswith("thought_top_k does nothing on a model without a residual gate") and "leave it" in message


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
def test_a_gated_model_decodes_in_upstreams_sampling_loop_or_not_at_all(make, no_manager, how, named):
    """Elsewhere it would be read without its thoughts, and without a word."""
    message = refusal(make(), "h3po", **how)
    assert f"a model with a residual gate does not work with {named}" in message
    assert "num_beams=1" in message and "config.thinking_residual_enabled=False" in message


def test_continuous_batching_of_a_gated_model_is_refused(make, no_manager):
    model = make()
    for call in (
        lambda: model.generate_batch([[5, 6, 7]], generation_config=GenerationConfig(max_new_tokens=2)),
        lambda: model.init_continuous_batching(GenerationConfig(max_new_tokens=2)),
    ):
        with pytest.raises(ValueError, match="a model with a residual gate does not work with continuous") as error:
            call()
        assert "\n" not in str(error.value)


def test_the_configuration_saves_thought_top_k_when_it_is_set_and_nothing_when_not(make, tmp_path):
    assert GenerationConfig().thought_top_k is None
    make().generation_config.save_pretrained(tmp_path)
    assert "thought" not in (tmp_path / "generation_config.json").read_text()
    GenerationConfig(thought_top_k=0).save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).thought_top_k == 0
