# SPDX-License-Identifier: Apache-2.0
"""What must hold for generation in every mode: agreement with the scoring pass, groups, lonely paths,
gradients, decoding cost."""

from __future__ import annotations

import gc

import pytest
import torch
from live_bytes import LiveBytes
from reference.gated import PARAMETERS, STRONG
from reference.tiny import LIVELY, alive_after, left_padded, small_tokenizer, teacher_forced_logps
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.m3po import M3POGenerationState
from transformers.m3po.thinking.thoughts import thought_bags

EOS = [2, 60, 61, 62]
TEMPERATURE = 0.7
CROSS_PATH = {"enable_cross_path": True, "cross_path_lambda": 0.3}
# What a mode is asked for with, and the model it needs.
FLAGS = {"m3po": CROSS_PATH, "hrpo": {}, "h3po": CROSS_PATH}
GATE = {"m3po": {}, "hrpo": STRONG, "h3po": STRONG}
GATED = ["hrpo", "h3po"]


@pytest.fixture(params=list(FLAGS))
def mode(request):
    return request.param


@pytest.fixture
def model(family, mode):
    return family(**LIVELY, **GATE[mode])


def rollout(model, mode, prompts=None, seed=2, **overrides):
    arguments = {
        **(prompts or left_padded([4, 9, 7])),
        "tokenizer": small_tokenizer(),
        "do_sample": True,
        "temperature": TEMPERATURE,
        "top_k": 0,
        "num_return_sequences": 4,
        "max_new_tokens": 40,
        "eos_token_id": EOS,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        **FLAGS[mode],
    }
    torch.manual_seed(seed)
    return model.generate(**(arguments | overrides))


# By mode: the phase, what is kept and the cache, so that each pair of them meets in some call.
EVERYWHERE = {"cross_path_phase": "all", "cache_implementation": "static"}
WAYS = {
    "m3po": [{}, EVERYWHERE, {"cross_path_top_k": 1, "use_cache": False}],
    "hrpo": [{}, EVERYWHERE, {"thought_top_k": 0, "use_cache": False}],
    "h3po": [{}, {**EVERYWHERE, "thought_top_k": 0}, {"cross_path_top_k": 1, "thought_top_k": 0, "use_cache": False}],
}


@pytest.mark.all_families
def test_rollout_and_scoring_pass_agree_to_1e_4_and_part_when_the_bags_are_withheld(family, mode):
    for overrides in WAYS[mode]:
        check_agreement(family(**LIVELY, **GATE[mode]), mode, overrides)


def check_agreement(model, mode, overrides):
    prompts = left_padded([4, 9, 7])
    prompt_mask = prompts["attention_mask"]
    for seed in range(2, 22):  # until the paths end at three lengths or more
        output = rollout(model, mode, prompts, seed, **overrides)
        ends = (output.rollout_logps != 0).sum(1)
        if ends.unique().numel() > 2 and (output.bag_weights > 0).any(-1).sum() > 30:
            break
    else:
        pytest.fail("only poor cases")

    def largest_difference(**bags):
        logps = teacher_forced_logps(model, output.sequences, prompt_mask, TEMPERATURE, **bags)
        return (logps - output.rollout_logps)[output.rollout_logps != 0].abs().max()

    with_bags = {"thinking_bag_ids": output.bag_ids, "thinking_bag_weights": output.bag_weights}
    assert largest_difference(**with_bags) < 1e-4
    assert largest_difference() > 0.05
    off_by_one = {name: bag.roll(1, dims=1) for name, bag in with_bags.items()}
    assert largest_difference(**off_by_one) > 0.05


@pytest.mark.all_families
def test_the_vectors_handed_out_are_those_the_model_was_fed(model, mode):
    prompts = left_padded([4, 9, 7])
    output = rollout(model, mode, prompts, return_thinking_embeds=True)
    width = prompts["input_ids"].shape[1]
    mask = prompts["attention_mask"].repeat_interleave(4, 0)
    mask = torch.cat([mask, torch.ones_like(output.sequences[:, width:])], dim=1)
    embeds = model.get_input_embeddings()(output.sequences[:, :width])
    with torch.no_grad():
        logits = model(
            inputs_embeds=torch.cat([embeds, output.thinking_embeds], dim=1),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp_min(0),
        ).logits
    logps = (logits[:, width - 1 : -1] / TEMPERATURE).log_softmax(-1)
    logps = logps.gather(-1, output.sequences[:, width:, None]).squeeze(-1)
    sampled = output.rollout_logps != 0
    assert (logps - output.rollout_logps)[sampled].abs().max() < 1e-4


def test_groups_never_mix(model, mode):
    prompts = left_padded([9, 9, 9])
    other = {name: value.clone() for name, value in prompts.items()}
    other["input_ids"][1] = torch.arange(140, 149)
    # No row ends early, so that every row draws at every step in both calls.
    before, after = (rollout(model, mode, p, eos_token_id=255, suppress_tokens=[255]) for p in (prompts, other))
    assert not torch.equal(before.sequences[4:8, 9:], after.sequences[4:8, 9:])
    for rows in (slice(0, 4), slice(8, 12)):
        assert torch.equal(before.sequences[rows], after.sequences[rows])
        assert torch.equal(before.bag_ids[rows], after.bag_ids[rows])
        assert torch.equal(before.bag_weights[rows], after.bag_weights[rows])
    one = M3POGenerationState(group_ids=torch.zeros(12, dtype=torch.long))
    together = [rollout(model, mode, p, eos_token_id=255, suppress_tokens=[255], m3po=one) for p in (prompts, other)]
    same = torch.equal(together[0].sequences[:4], together[1].sequences[:4])
    assert same == (mode == "hrpo"), "the test cannot tell"  # in mode hrpo no path hears another, whatever the groups


@pytest.mark.parametrize("mode", ["m3po", "h3po"])
def test_a_path_whose_peers_have_left_gets_its_own_vector_bit_for_bit(model, mode):
    output = rollout(model, mode, return_thinking_embeds=True, output_scores=True)
    tokens = output.sequences[:, -output.rollout_logps.shape[1] :]
    active = output.thinking_mask & alive_after(tokens, EOS)
    alone = active & (active.view(3, 4, -1).sum(1).repeat_interleave(4, 0) == 1)
    assert alone.any(), "nobody was left alone"
    if mode == "m3po":
        assert torch.equal(output.thinking_embeds[alone], model.get_input_embeddings()(tokens[alone]))
    else:  # its own thought
        probs = torch.stack(output.scores, dim=1).softmax(-1)
        ids, weights = thought_bags(probs[alone], 64, 256)
        assert torch.equal(output.bag_ids[alone], ids) and torch.equal(output.bag_weights[alone], weights)
    assert output.thinking_embeds.isfinite().all() and output.rollout_logps.isfinite().all()


@pytest.mark.parametrize("mode", ["m3po", "h3po"])
def test_a_group_of_one_decodes_as_if_alone(model, mode):
    prompts = left_padded([9, 9, 9])
    state = M3POGenerationState(group_ids=torch.tensor([4, 1, 9]))
    common = {"num_return_sequences": 1, "return_thinking_embeds": True}
    output = rollout(model, mode, prompts, m3po=state, **common)
    plain = rollout(model, mode, prompts, enable_cross_path=False, **common)
    assert torch.equal(output.sequences, plain.sequences)
    if mode == "m3po":
        own = model.get_input_embeddings()(output.sequences[:, 9:])
        assert output.bag_ids is None and torch.equal(output.thinking_embeds, own)
    else:
        assert torch.equal(output.bag_ids, plain.bag_ids) and torch.equal(output.bag_weights, plain.bag_weights)
        assert torch.equal(output.thinking_embeds, plain.thinking_embeds) and (output.bag_weights > 0).any()


def backward(model, output):
    """Gradients of the summed log-probs of what was sampled, with the bags of the rollout."""
    prompt_length = output.sequences.shape[1] - output.rollout_logps.shape[1]
    bags = {"thinking_bag_ids": output.bag_ids, "thinking_bag_weights": output.bag_weights}
    logps = model(output.sequences, **bags).logits[:, prompt_length - 1 : -1].log_softmax(-1)
    logps = logps.gather(-1, output.sequences[:, prompt_length:, None]).squeeze(-1)
    (logps * (output.rollout_logps != 0)).sum().backward()


def test_the_gradient_of_a_scoring_pass_is_finite_where_a_path_was_alone(model, mode):
    backward(model, rollout(model, mode))
    gradients = {name.removeprefix("model."): p.grad for name, p in model.named_parameters()}
    assert set(PARAMETERS) <= gradients.keys() or mode == "m3po"
    assert all(grad.isfinite().all() and grad.abs().sum() > 0 for grad in gradients.values())


@pytest.mark.all_families
@pytest.mark.parametrize("mode", GATED)
def test_gradient_reaches_the_gate_at_every_position_it_acts_on_from_the_first_pass(family, mode):
    """At HRPO's start, where a thought is a hundredth of an input: no position and no parameter is left out."""
    bounds = {"thinking_residual_r_min": 0.99, "thinking_residual_r_max": 0.999}
    model, seen = family(**{**LIVELY, **GATE[mode], **bounds}), {}
    output = rollout(model, mode)
    mixed = (output.bag_weights > 0).any(-1)
    assert mixed.any() and not mixed[:, :-1].all()

    def keep(name):
        def hook(module, args, made):
            made.retain_grad()
            seen[name] = made

        return hook

    names = sorted({name.split(".")[0] for name in PARAMETERS})
    for name in names:
        getattr(model.model, name).register_forward_hook(keep(name))
    backward(model, output)
    for name in names:  # what W_r and W_i give, and a: a parameter's gradient is the sum over the positions
        assert torch.equal(seen[name].grad.abs().sum(-1) > 0, mixed), name
    for name in PARAMETERS:
        assert (model.model.get_parameter(name).grad != 0).all(), name


class Watching(M3POGenerationState):
    """A state that notes after each step where its record lies and what of size B x V is alive."""

    def after_sampling(self, input_ids, next_token_scores, unfinished_sequences):
        super().after_sampling(input_ids, next_token_scores, unfinished_sequences)
        alive = [
            x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and x.numel() >= next_token_scores.numel()
        ]
        self.records = getattr(self, "records", set()) | {
            (self.bag_ids.data_ptr(), self.bag_weights.data_ptr(), self.rollout_logps.data_ptr())
        }
        self.alive = [*getattr(self, "alive", []), len(alive)]


def test_the_record_is_allocated_once_and_no_history_of_distributions_is_kept(tiny_llama, mode):
    # More rows times vocabulary than any weight or cache holds: what is counted are distributions.
    state = Watching()
    model = tiny_llama(vocab_size=4096, num_hidden_layers=1, **GATE[mode])
    model.lm_head.weight, model.model.embed_tokens.weight = (
        torch.nn.Parameter(torch.randn(4096, 32)) for _ in range(2)
    )
    rollout(model, mode, num_return_sequences=12, max_new_tokens=12, eos_token_id=2, suppress_tokens=[2], m3po=state,
            cross_path_phase="all")  # fmt: skip
    assert len(state.alive) == 12 and len(state.records) == 1
    assert len(set(state.alive[1:-1])) == 1, f"tensors of size B x V per step: {state.alive}"


def test_what_is_alive_beyond_the_record_does_not_grow_with_the_steps(tiny_llama, mode):
    """The peak of all tensors, less that of plain generation, less the preallocated record."""

    def added(steps):
        lengths = {"max_new_tokens": steps, "min_new_tokens": steps, "eos_token_id": 2}
        off = {"enable_cross_path": False, "cross_path_lambda": None}
        with LiveBytes() as plain:
            rollout(bare, mode, **lengths, **off)
        state = M3POGenerationState()
        few = {} if mode == "m3po" else {"thought_top_k": 8}
        with LiveBytes() as thinking:
            output = rollout(model, mode, m3po=state, **lengths, **few)
        record = [output.bag_ids, output.bag_weights, output.rollout_logps, output.thinking_mask]
        record += [state._rollout.trace, state._rollout.peers]
        return thinking.peak - plain.peak - sum(tensor.nbytes for tensor in record)

    model, bare = tiny_llama(**GATE[mode]), tiny_llama()
    assert added(24) <= added(12) < 64 * 1024


class NoSynchronisation(TorchDispatchMode):
    """Raises at operations whose result or shape the host has to wait for."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.", "is_nonzero", "bincount")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if any(word in name for word in self.WAITING) and "not_equal" not in name:
            raise AssertionError(f"{name} waits for the device")
        masks = [x for x in args[1] if x is not None and x.dtype == torch.bool] if "aten.index" in name else []
        if masks:
            raise AssertionError(f"{name} with a mask waits for the device")
        return func(*args, **(kwargs or {}))


class Unsynchronised(M3POGenerationState):
    """A state whose steps must not read anything back."""

    def before_forward(self, model_inputs):
        with NoSynchronisation():
            super().before_forward(model_inputs)

    def after_sampling(self, *arguments):
        with NoSynchronisation():
            super().after_sampling(*arguments)


@pytest.mark.parametrize("groups", ["in order", "shuffled"])
def test_a_step_reads_nothing_back_from_the_device(tiny_llama, monkeypatch, mode, groups):
    def refuse(*args, **kwargs):
        raise AssertionError("a step copies to the host")

    state = Unsynchronised()
    overrides = {} if mode == "hrpo" else {"cross_path_top_k": 2}
    if groups == "shuffled":
        state.group_ids = torch.tensor([1, 0, 1, 0, 0, 2, 1, 0, 2, 2, 1, 0])
    inner = Unsynchronised.after_sampling

    def step(self, *arguments):
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
                patch.setattr(torch.Tensor, name, refuse)
            inner(self, *arguments)

    monkeypatch.setattr(Unsynchronised, "after_sampling", step)
    output = rollout(tiny_llama(**LIVELY, **GATE[mode]), mode, m3po=state, **overrides)
    assert (output.bag_weights > 0).any()


def test_the_watch_for_synchronisation_sees_one():
    values = torch.rand(3)
    for read in (lambda: bool(values.sum() > 0), lambda: values.max().item(), lambda: values[values > 0.5]):
        with pytest.raises(AssertionError, match="waits for the device"), NoSynchronisation():
            read()
