# SPDX-License-Identifier: Apache-2.0
"""Debugging: every switch logs every step on every path, and while it is off nothing is read back from the device."""

from __future__ import annotations

import contextlib
import logging
from importlib import import_module

import pytest
import torch
from reference.latent import with_aslr
from reference.tiny import left_padded, small_tokenizer
from transformers.m3po import (
    M3POGenerationState,
    ThinkingSettings,
    apply_cross_path_interaction,
    apply_m3po_to_logits,
    debugging,
    generate_with_m3po,
)
from transformers.m3po.gating import create_gating_function

COMMON = {"tokenizer": small_tokenizer(), "eos_token_id": 255, "pad_token_id": 0, "top_k": 0, "max_new_tokens": 3}


@contextlib.contextmanager
def heard():
    """The warnings of `transformers.m3po` as a list that fills."""
    logger, messages, handler = logging.getLogger("transformers.m3po"), [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def rollout(model, paths=4, **given):
    torch.manual_seed(1)
    switch = {"enable_cross_path": True} if "enable_cross_path" not in given else {}
    call = {**left_padded([5, 9]), **COMMON, "do_sample": True, "num_return_sequences": paths}
    return model.generate(**(call | switch | given))


WAYS = {
    "argument": {"debug": True},
    "option of the gate": {"gating_config": {"debug": True}},
    "environment": {},
    "gate itself": {"m3po": None},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("paths", [4, 9])
def test_every_switch_logs_every_step_of_groups_of_every_size(tiny_llama, monkeypatch, way, paths):
    given = dict(WAYS[way])
    if way == "environment":
        monkeypatch.setenv("M3PO_DEBUG", "1")
    if way == "gate itself":
        gate = create_gating_function("baseline", {"debug": True})
        given = {"m3po": M3POGenerationState(gating_function=gate)}
    with heard() as lines:
        rollout(tiny_llama(), paths=paths, cross_path_lambda=0.3, **given)
    assert [line.split(":")[0] for line in lines] == ["M3PO step 0", "M3PO step 1", "M3PO step 2"]
    assert " active paths in 2 groups, lambda=0.3, temperature=0.1, gating_function=CosineGating(" in lines[0]
    for line in lines[:-1]:
        assert all(word in line for word in ("entropy", "largest weight", "variance", "similarity"))
        assert ("\nweights\n" in line) == (paths <= 8), "matrices are of small groups"
    assert "0 active paths" in lines[-1] and "no path has an active peer" in lines[-1], "nothing goes on after the last"


def test_logged_statistics_are_those_of_the_rollout(tiny_llama):
    with heard() as lines:
        output = rollout(
            tiny_llama(), debug=True, max_new_tokens=2, return_dict_in_generate=True, cross_path_phase="all"
        )
    for name, text in (("attention_entropy", "entropy"), ("attention_max", "largest weight")):
        assert f"{text} {float(output.statistics[name]):.4f}" in lines[0]


def test_nothing_is_logged_and_nothing_read_back_while_debugging_is_off(tiny_llama, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("debugging is off")

    for place in (
        debugging,
        *(import_module(f"transformers.m3po.{name}") for name in ("generation.rollout", "aslr.modules")),
    ):
        for name in ("log_attention", "log_thoughts", "log_latent_paths"):
            if hasattr(place, name):
                monkeypatch.setattr(place, name, refuse)
    with heard() as lines:
        rollout(tiny_llama())
    assert lines == []


@pytest.mark.parametrize(
    ("numbers", "given", "why"),
    [
        ({"thinking_residual_enabled": True}, {"enable_cross_path": None, "debug": True}, "mode hrpo"),
        ({}, {"cross_path_lambda": 0.0, "debug": True}, "lambda=0.0"),
        ({}, {"m3po": "alone"}, "groups of one"),
    ],
)
def test_steps_without_interaction_say_why(tiny_llama, numbers, given, why):
    if given.get("m3po"):
        settings = ThinkingSettings(debug=True)
        state = M3POGenerationState(group_ids=torch.arange(8), settings=settings)
        given = {"m3po": state, "enable_cross_path": None}
    with heard() as lines:
        rollout(tiny_llama(**numbers), **given)
    assert len(lines) == 3 and all(f"paths think, none listens to another ({why})" in line for line in lines)
    assert "8 of 8" in lines[0] and ("soft thoughts: 64 entries" in lines[0]) == bool(numbers)


def test_aslr_logs_its_router_rounds_and_latent_paths(tiny_llama, monkeypatch):
    model = with_aslr(tiny_llama(), num_paths=3, max_iterations=2)
    with heard() as lines:
        rollout(model, enable_cross_path=None, is_m3po_inference=False)
        assert lines == []
        monkeypatch.setenv("M3PO_DEBUG", "1")
        rollout(model, enable_cross_path=None, is_m3po_inference=False)
        forwards = [line for line in lines if line.startswith("ASLR: the router activates")]
        assert len(forwards) == 3, "one for each forward"
        assert all("of 8 positions" in line and "2 rounds of 3 latent paths" in line for line in forwards[1:]), forwards
        lines.clear()
        rollout(model, enable_cross_path=None, is_m3po_inference=True)
    assert not any(line.startswith("ASLR: the router") for line in lines)


@pytest.mark.parametrize("way", ["gate", "environment"])
def test_functions_on_dense_vectors_and_logits_log_too(monkeypatch, way):
    gate = create_gating_function("raw_dot", {"temperature": 0.2, "debug": way == "gate"})
    if way == "environment":
        monkeypatch.setenv("M3PO_DEBUG", "1")
    probs = torch.rand(4, 6).softmax(-1)
    with heard() as lines:
        apply_cross_path_interaction(
            torch.rand(4, 3), probs, [True] * 4, group_ids=[0, 0, 1, 1], lambda_blend=0.3, gating_function=gate
        )
        apply_m3po_to_logits(torch.rand(4, 1, 6), [0, 0, 1, 1], [[True]] * 4, gate, lambda_blend=0.3)
    assert [line.split(":")[0] for line in lines] == ["M3PO interaction", "M3PO logits"]
    assert all(
        "lambda=0.3, temperature=0.2, gating_function=RawDotProductGating(temperature=0.2" in line for line in lines
    )


# --- a gate that is given itself


def test_temperature_of_a_given_gate_is_that_of_the_interaction(tiny_llama):
    call = {**left_padded([5, 9]), **COMMON, "num_generations": 4, "lambda_blend": 0.4, "output_scores": True}
    torch.manual_seed(1)
    named = rollout(
        tiny_llama(), gating_type="raw_dot", cross_path_temp=0.7, cross_path_lambda=0.4, return_dict_in_generate=True
    )
    torch.manual_seed(1)
    gate = create_gating_function("raw_dot", {"temperature": 0.7})
    given = generate_with_m3po(tiny_llama(), **call, gating_function=gate)
    torch.manual_seed(1)
    default = generate_with_m3po(tiny_llama(), **call, gating_function=create_gating_function("raw_dot"))
    assert torch.equal(named.bag_weights, given.bag_weights)
    assert not torch.equal(default.bag_weights, given.bag_weights)


def test_given_gate_and_another_temperature_contradict_each_other(tiny_llama):
    gate = create_gating_function("raw_dot", {"temperature": 0.7})
    with pytest.raises(ValueError, match="cross_path_temp=0.1 and RawDotProductGating.temperature=0.7. contradict"):
        generate_with_m3po(tiny_llama(), **left_padded([5]), **COMMON, gating_function=gate, temperature_m3po=0.1)
    with pytest.raises(ValueError, match="temperature=0.1 and RawDotProductGating"):
        apply_cross_path_interaction(
            torch.rand(2, 3), torch.rand(2, 6), [True] * 2, group_ids=[0, 0], temperature=0.1, gating_function=gate
        )


@pytest.mark.parametrize(
    ("name", "value"), [("gating_type", "raw_dot"), ("gating_config", {"debug": True})], ids=["type", "config"]
)
def test_gate_that_is_named_beside_a_given_one_is_refused(tiny_llama, name, value):
    state = M3POGenerationState(gating_function=create_gating_function("raw_dot"))
    with pytest.raises(ValueError, match=f"{name} is not read beside gating_function"):
        rollout(tiny_llama(), m3po=state, **{name: value})


# --- what comes in


def test_lists_are_taken_for_masks_and_groups():
    embeds, probs = torch.rand(4, 3), torch.rand(4, 6).softmax(-1)
    listed = apply_cross_path_interaction(embeds, probs, [True, True, False, True], group_ids=[0, 0, 0, 0])
    mask = torch.tensor([True, True, False, True])
    tensors = apply_cross_path_interaction(embeds, probs, mask, group_ids=torch.zeros(4, dtype=torch.long))
    assert all(torch.equal(*pair) for pair in zip(listed, tensors, strict=True))
    with pytest.raises(ValueError, match="thinking_mask has the shape .3,. for rows .4,."):
        apply_cross_path_interaction(embeds, probs, [True] * 3, group_ids=[0] * 4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_distribution_that_is_not_finite_is_an_error_that_names_the_row(bad):
    probs = torch.rand(4, 6).softmax(-1)
    probs[2, 1] = bad
    with pytest.raises(ValueError, match="probs is not finite in row 2: look for NaN"):
        apply_cross_path_interaction(torch.rand(4, 3), probs, [True] * 4, group_ids=[0] * 4)


def test_row_of_a_rollout_whose_logits_are_not_finite_is_named(tiny_llama):
    """Sampling stops by itself; a greedy token of NaN logits would be taken, so the end of a rollout looks."""
    model = tiny_llama()

    def spoil(input_ids, scores):
        scores[1] = float("nan") if input_ids.shape[1] > 10 else scores[1]
        return scores

    with pytest.raises(ValueError, match="the distribution of row 1 was not finite at completion token 2"):
        model.generate(
            **left_padded([9, 9]),
            **COMMON,
            m3po=M3POGenerationState(group_ids=torch.tensor([0, 0]), settings=ThinkingSettings()),
            logits_processor=[spoil],
        )
