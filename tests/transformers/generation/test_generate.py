# SPDX-License-Identifier: Apache-2.0
"""`generate` with cross-path interaction: its call, what it returns, and the batches and caches it works with."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch
from reference import cross_path
from reference.tiny import LIVELY, Script, alive_after, alive_before, left_padded, small_tokenizer, text_of
from transformers import StaticCache
from transformers.m3po import M3POGenerateOutput, M3POGenerationState, ThinkingSettings, generate_with_m3po

FIELDS = ["sequences", "thinking_embeds", "thinking_mask", "embeds_ratio"]
EOS = [2, 60, 61, 62, 63]


@pytest.fixture
def model(family):
    return family(**LIVELY)


def rollout(model, seed=1, lengths=(5, 9), paths=4, **overrides):
    """A rollout of two left-padded prompts, ragged ends, marker in reach, all of it recorded."""
    arguments = {
        **left_padded(list(lengths)),
        "tokenizer": small_tokenizer(),
        "do_sample": True,
        "top_k": 0,
        "num_return_sequences": paths,
        "max_new_tokens": 30,
        "eos_token_id": EOS,
        "pad_token_id": 0,
        "enable_cross_path": True,
        "cross_path_lambda": 0.4,
        "cross_path_temp": 0.2,
        "return_thinking_embeds": True,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    torch.manual_seed(seed)
    return model.generate(**(arguments | overrides))


def completions_of(output):
    return output.sequences[:, -output.rollout_logps.shape[1] :]


def test_the_shortest_call_returns_the_fields_in_their_order(smollm2_tokenizer, tiny_llama):
    tok = smollm2_tokenizer
    model = tiny_llama(vocab_size=len(tok), bos_token_id=1, eos_token_id=2, pad_token_id=2)
    prompt = "Calculate 23 × 17. Show your reasoning step by step."
    ids = tok(prompt, return_tensors="pt").input_ids
    outputs = model.generate(
        ids,
        tokenizer=tok,
        enable_cross_path=True,
        cross_path_lambda=0.1,
        cross_path_temp=0.1,
        return_thinking_embeds=True,
        num_return_sequences=8,
        do_sample=True,
        max_new_tokens=200,
    )
    assert isinstance(outputs, M3POGenerateOutput)
    assert list(outputs)[:4] == FIELDS and outputs[0] is outputs.sequences and outputs[1] is outputs.thinking_embeds
    steps = outputs.sequences.shape[1] - ids.shape[1]
    assert outputs.sequences.shape[0] == 8 and 1 < steps <= 200
    assert outputs[1].shape == (8, steps, 32) and outputs[2].shape == outputs[3].shape == (8, steps)
    assert outputs.bag_ids.shape == outputs.bag_weights.shape == (8, steps, 8)
    assert all(text.startswith(prompt) for text in tok.batch_decode(outputs[0]))
    blended = outputs.bag_weights.sum(-1) > 0
    torch.testing.assert_close(outputs.embeds_ratio[blended], torch.full((int(blended.sum()),), 0.9))
    assert blended.any() and (outputs.embeds_ratio[~blended] == 1).all()


@pytest.mark.all_families
def test_every_recorded_vector_mask_and_log_prob_follows_from_the_formulas(model):
    output, tokenizer = rollout(model), small_tokenizer()
    tokens, embedding = completions_of(output), model.get_input_embeddings().weight.detach()
    groups = [0] * 4 + [1] * 4
    sampled, goes_on = alive_before(tokens, EOS), alive_after(tokens, EOS)
    texts = [[text_of(tokenizer, row[: t + 1]) for t in range(len(row))] for row in tokens.tolist()]
    thinking = sampled & ~torch.tensor([["####" in text for text in row] for row in texts])
    assert torch.equal(output.thinking_mask, thinking)
    assert (thinking.sum(1).unique().numel() > 2) and (thinking & ~goes_on).any(), "ends are not ragged"
    for t, scores in enumerate(output.scores):
        active, own = (thinking & goes_on)[:, t].tolist(), embedding[tokens[:, t]]
        probs = scores.double().softmax(-1)
        expected, rows = cross_path.interaction(own, probs, active, groups, 0.4, 0.2)
        torch.testing.assert_close(output.thinking_embeds[:, t].double(), expected, atol=2e-5, rtol=0)
        blended = rows.sum(-1) > 0
        assert torch.equal(output.thinking_embeds[~blended, t], own[~blended])
        assert torch.equal(output.bag_weights[:, t].sum(-1) > 0, blended)
        torch.testing.assert_close(output.embeds_ratio[:, t], torch.where(blended, 0.6, 1.0))
        logps = probs.gather(-1, tokens[:, t, None]).log().squeeze(-1).float() * sampled[:, t]
        torch.testing.assert_close(output.rollout_logps[:, t], logps, atol=1e-5, rtol=1e-5)


def test_the_statistics_are_the_means_of_the_rollout(model):
    output = rollout(model)
    tokens = completions_of(output)
    active = output.thinking_mask & alive_after(tokens, EOS)
    groups, rows, similarities = [0] * 4 + [1] * 4, [], []
    for t, scores in enumerate(output.scores):
        probs = scores.double().softmax(-1)
        step = cross_path.weights(probs, active[:, t].tolist(), groups, 0.2)
        rows += [[float(a) for a in row] for row in step if sum(row) > 0]
        for i, row in enumerate(step):
            similarities += [float(cross_path.similarity(probs[i], probs[j])) for j in range(8) if row[j] > 0]
    listened = torch.tensor(rows)
    counts = (listened > 0).sum(-1)
    variances = torch.stack([row[row > 0].var(correction=0) for row in listened])
    per_group = output.thinking_mask.view(2, 4, -1).sum(1).float()
    expected = {
        "attention_entropy": cross_path.mean_attention_entropy(listened),
        "attention_max": listened.amax(-1).mean(),
        "attention_variance": variances.mean(),
        "active_paths": per_group[per_group > 0].mean(),
        "similarity_mean": sum(similarities) / len(similarities),
        "similarity_min": min(similarities),
        "similarity_max": max(similarities),
    }
    assert counts.min() == 1 and counts.max() == 3
    assert output.statistics.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(output.statistics[name].item(), float(value), atol=2e-5, rtol=1e-4, msg=name)


def test_dense_vectors_and_the_object_come_only_when_asked_for(model):
    plain = rollout(model, return_thinking_embeds=None, return_dict_in_generate=False, output_scores=False)
    assert type(plain) is torch.Tensor
    recorded = rollout(model, return_thinking_embeds=None)
    assert recorded.thinking_embeds is None and recorded.scores[0].shape == (8, 256)
    dense = rollout(model, return_dict_in_generate=False, output_scores=False)
    assert dense.thinking_embeds.shape[-1] == 32 and dense.scores is None and dense.past_key_values is None
    assert torch.equal(plain, recorded.sequences) and torch.equal(plain, dense.sequences)


@pytest.mark.parametrize("cache", ["static", "given", "none"])
def test_every_cache_gives_the_same_tokens_and_bags(model, cache):
    expected = rollout(model)
    arguments = {
        "static": {"cache_implementation": "static"},
        "given": {"past_key_values": StaticCache(config=model.config, max_cache_len=64)},
        "none": {"use_cache": False},
    }[cache]
    output = rollout(model, **arguments)
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.bag_ids, expected.bag_ids)
    torch.testing.assert_close(output.bag_weights, expected.bag_weights, atol=1e-4, rtol=0)
    torch.testing.assert_close(output.rollout_logps, expected.rollout_logps, atol=1e-4, rtol=0)


def test_what_the_paths_hear_changes_what_they_say(model):
    silent = rollout(model, cross_path_lambda=0.0)
    assert not torch.equal(rollout(model).sequences[:, :20], silent.sequences[:, :20])
    assert silent.bag_ids is None and (silent.embeds_ratio == 1).all()


def test_a_prompt_padded_further_gives_the_same_tokens(model):
    prompts = left_padded([5, 9])
    pad = torch.zeros(2, 4, dtype=torch.long)
    wider = {name: torch.cat([pad, value], dim=1) for name, value in prompts.items()}
    narrow, wide = rollout(model), rollout(model, **wider)
    assert torch.equal(completions_of(wide), completions_of(narrow))
    torch.testing.assert_close(wide.bag_weights, narrow.bag_weights, atol=1e-4, rtol=0)


def test_a_marker_in_the_prompt_does_not_end_the_thinking_and_one_in_the_completion_does(model):
    tok = small_tokenizer()
    prompt = tok.convert_tokens_to_ids(["a", "####", "5", "##"])
    script = [
        tok.convert_tokens_to_ids(row)
        for row in (
            ["##", "b", "####", "c", "d", "e"],  # the prompt's "##" does not count
            ["a", "##", "##", "####", "d", "</s>"],
            ["a", "b", "c", "d", "e", "####"],
            ["a", "b", "Ċ####", "</s>", "<pad>", "<pad>"],
        )
    ]
    output = model.generate(
        torch.tensor([prompt]),
        tokenizer=tok,
        num_return_sequences=4,
        max_new_tokens=6,
        do_sample=True,
        enable_cross_path=True,
        return_dict_in_generate=True,
        logits_processor=[Script(script)],
        eos_token_id=2,
        pad_token_id=0,
    )
    assert completions_of(output).tolist() == script
    assert output.thinking_mask.long().tolist() == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 0, 0, 0, 0],
    ]
    # From the third token on one path thinks alone: it hears nobody, and nobody hears it.
    assert torch.equal((output.bag_weights.sum(-1) > 0).long(), torch.tensor([[1, 1, 0, 0, 0, 0]] * 4))


def test_phase_all_blends_to_the_end_of_each_row_and_needs_no_tokenizer(model):
    everywhere = rollout(model, cross_path_phase="all", tokenizer=None)
    assert torch.equal(rollout(model, cross_path_phase="all").bag_weights, everywhere.bag_weights)
    tokens = completions_of(everywhere)
    assert torch.equal(everywhere.thinking_mask, alive_before(tokens, EOS))
    alive = alive_after(tokens, EOS)
    with_peer = alive & (alive.view(2, 4, -1).sum(1).repeat_interleave(4, 0) > 1)
    assert torch.equal(everywhere.bag_weights.sum(-1) > 0, with_peer)
    assert any("####" in text_of(small_tokenizer(), row) for row in tokens.tolist())


def test_top_k_records_the_strongest_peers_only(model):
    output = rollout(model, cross_path_top_k=2)
    assert output.bag_ids.shape[-1] == output.bag_weights.shape[-1] == 3
    tokens = completions_of(output)
    active = output.thinking_mask & alive_after(tokens, EOS)
    for t, scores in enumerate(output.scores):
        rows = cross_path.weights(scores.double().softmax(-1), active[:, t].tolist(), [0] * 4 + [1] * 4, 0.2)
        for i, row in enumerate(rows):
            strongest = torch.stack(row).topk(2).values
            expected = 0.4 * strongest / strongest.sum().clamp_min(1e-300)
            torch.testing.assert_close(output.bag_weights[i, t, 1:].double(), expected, atol=2e-5, rtol=0)


def test_groups_of_any_size_and_order_come_from_the_state(model):
    state = M3POGenerationState(group_ids=torch.tensor([5, 1, 5, 1, 1, 8]))
    output = rollout(model, lengths=(5, 5, 5, 5, 5, 5), paths=1, m3po=state)
    tokens, groups = completions_of(output), [5, 1, 5, 1, 1, 8]
    active = output.thinking_mask & alive_after(tokens, EOS)
    for t, scores in enumerate(output.scores):
        own = model.get_input_embeddings().weight.detach()[tokens[:, t]]
        expected, _ = cross_path.interaction(own, scores.double().softmax(-1), active[:, t].tolist(), groups, 0.4, 0.2)
        torch.testing.assert_close(output.thinking_embeds[:, t].double(), expected, atol=2e-5, rtol=0)
    assert torch.equal(state.bag_weights, output.bag_weights) and torch.equal(state.thinking_mask, output.thinking_mask)
    assert (output.bag_weights[5] == 0).all() and (output.bag_weights[:5] > 0).any()


def test_greedy_decoding_records_the_log_probs_of_its_choice(model):
    state = M3POGenerationState(group_ids=torch.tensor([0, 0, 1, 1]))
    output = rollout(model, lengths=(5, 9, 7, 9), paths=1, m3po=state, do_sample=False, top_k=None)
    assert (output.bag_weights > 0).any()
    best = torch.stack([scores.log_softmax(-1).amax(-1) for scores in output.scores], dim=1)
    alive = alive_before(completions_of(output), EOS)
    torch.testing.assert_close(output.rollout_logps, best * alive, atol=1e-5, rtol=0)


def test_a_state_alone_records_log_probs_and_leaves_the_tokens_and_the_answer_as_they_are(model):
    plain = {"enable_cross_path": False, "return_thinking_embeds": None, "output_scores": False}
    state = M3POGenerationState()
    recorded = rollout(model, m3po=state, **plain)
    untouched = rollout(model, **plain)
    assert type(recorded) is type(untouched) and torch.equal(recorded.sequences, untouched.sequences)
    assert state.bag_ids is None and state.thinking_mask is None and state.rollout_logps.min() < -1


def test_generate_with_m3po_is_the_same_call(model):
    prompts = left_padded([5, 9])
    common = {"tokenizer": small_tokenizer(), "eos_token_id": EOS, "pad_token_id": 0, "top_k": 0}
    expected = rollout(model, return_thinking_embeds=None, output_scores=False, max_new_tokens=12)
    torch.manual_seed(1)
    output = generate_with_m3po(model, **prompts, max_new_tokens=12, num_generations=4, lambda_blend=0.4,
                                temperature_m3po=0.2, **common)  # fmt: skip
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.bag_weights, expected.bag_weights)
    torch.manual_seed(1)
    uniform = generate_with_m3po(model, **prompts, max_new_tokens=3, num_generations=4, lambda_blend=0.3,
                                 gating_function=lambda p: torch.ones(2, 4, 4), **common)  # fmt: skip
    full = (uniform.bag_weights > 0).all(-1)
    assert full.any()
    torch.testing.assert_close(uniform.bag_weights[full][:, 1:], torch.full((int(full.sum()), 3), 0.1))


def test_both_entries_ask_for_a_tokenizer_in_the_same_words(model):
    """Where the paths part is part of the method: without a tokenizer neither entry guesses it."""
    call = {**left_padded([5, 9]), "max_new_tokens": 9, "top_k": 0}
    wanted = "tokenizer is needed to find the answer marker .*pass tokenizer=.*or set cross_path_phase='all'"
    with pytest.raises(ValueError, match=wanted):
        generate_with_m3po(model, **call, num_generations=4)
    with pytest.raises(ValueError, match=wanted):
        model.generate(**call, do_sample=True, num_return_sequences=4, enable_cross_path=True)
    output = generate_with_m3po(model, **call, num_generations=4, cross_path_phase="all")
    assert output.thinking_mask[:, :2].all()


@pytest.mark.all_families
def test_the_answer_marker_of_the_model_is_the_default_of_the_argument(model):
    default = rollout(model).thinking_mask
    model.answer_start = "a"
    of_model = rollout(model).thinking_mask
    assert of_model.sum() < default.sum()
    assert torch.equal(rollout(model, answer_start="####").thinking_mask, default)


@contextlib.contextmanager
def heard(level):
    """The messages of `transformers.m3po` at this level, as a list that fills."""
    logger, messages, handler = logging.getLogger("transformers.m3po"), [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def test_the_rollout_says_in_one_line_what_it_does(tiny_llama):
    with heard(logging.INFO) as messages:
        for _ in range(2):
            rollout(tiny_llama(), cross_path_lambda=0.37, cross_path_temp=0.21, answer_start="##A", max_new_tokens=2)
    lines = [message for message in messages if "mode m3po" in message]
    assert len(lines) == 1 and "\n" not in lines[0]
    assert all(
        word in lines[0] for word in ("lambda=0.37", "temperature=0.21", "gating_type=baseline", "thinking", "##A")
    )


def test_settings_describe_themselves_in_one_line():
    line = ThinkingSettings(cross_path_lambda=0.2, cross_path_top_k=3).describe()
    assert line == "lambda=0.2, temperature=0.1, gating_type=baseline, top_k=3, phase=thinking, answer marker '####'"
    both = ThinkingSettings(mode="h3po", thought_top_k=32).describe()
    assert both == (
        "lambda=0.1, temperature=0.1, gating_type=baseline, thought_top_k=32, phase=thinking, answer marker '####'"
    )
    options = {"temperature": 0.2, "rank": 8, "vocab_size": 64}
    learned = ThinkingSettings(gating_type="luong", gating_config=options).describe()
    assert "temperature=0.2, gating_type=luong (rank=8, vocab_size=64), " in learned
    alone = ThinkingSettings(mode="hrpo", thought_top_k=0, cross_path_lambda=0.3).describe()
    assert alone == "thought_top_k=0, phase=thinking, answer marker '####'"
