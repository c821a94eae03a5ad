# SPDX-License-Identifier: Apache-2.0
"""Unsloth's forward, backward and decode step in every mode against the plain path, in float32 to 1e-4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import peft
import pytest
import torch
from transformers.m3po import M3POGenerationState

PROMPTS = torch.tensor([[0, 4, 5, 9], [0, 4, 5, 9], [0, 4, 5, 9], [8, 2, 7, 6], [8, 2, 7, 6], [0, 0, 0, 7]])
GROUPS = torch.tensor([0, 0, 0, 1, 1, 2])  # uneven, one path alone
SEEDS = torch.arange(6) + 11
SHORT = 6  # tokens of a completion in a training pass, which takes 50 ms each under Triton's interpreter
ENDS = [1, 14, 19]  # end tokens enough that some rows end and some do not
TOLERANCE = 1e-4  # of the largest value
FLOOR = 1e-2  # below it, of this

by_turns = pytest.mark.parametrize(("kind", "case"), cases.BY_TURNS)


def roll_out(
    net: Any, case: str, prompts: torch.Tensor = PROMPTS, length: int = 10
) -> tuple[torch.Tensor, M3POGenerationState]:
    """Samples completions of `length` tokens at most; the same random numbers every time."""
    state = M3POGenerationState(
        group_ids=GROUPS,
        settings=cases.settings(case),
        tokenizer=cases.tokenizer(),
        row_seeds=SEEDS if cases.CASES[case].get("aslr_enabled") else None,
    )
    torch.manual_seed(11)  # with it the three paths of a group differ for some steps, where a gate has a gradient
    given = {"do_sample": True, "top_k": 0, "top_p": 1.0, "eos_token_id": ENDS, "pad_token_id": 0}
    aslr = {"is_m3po_inference": False} if cases.CASES[case].get("aslr_enabled") else {}
    mask = (prompts != 0).long()
    sequences = net.generate(input_ids=prompts, attention_mask=mask, max_new_tokens=length, m3po=state, **given, **aslr)
    return sequences.clone(), state


def scoring_inputs(sequences: torch.Tensor, state: M3POGenerationState, case: str) -> dict[str, Any]:
    """What a scoring pass over whole sequences gets, prompts without padding."""
    inputs: dict[str, Any] = {"position_ids": torch.arange(sequences.shape[1]).expand(len(sequences), -1)}
    record = state.record.pad(state.record.logps.shape[1])
    record.group_ids = GROUPS
    inputs |= record.forward_kwargs(cases.LAMBDA, cases.CASES[case]["mode"] == "h3po")
    return inputs


def gradients(
    net: Any, sequences: torch.Tensor, inputs: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradients of a weighted sum of the completions' log-probs to all that is trained."""
    logits = net(input_ids=sequences, attention_mask=(sequences != 0).long(), use_cache=False, **inputs).logits.float()
    length = sequences.shape[1] - PROMPTS.shape[1]
    logps = logits[:, :-1].log_softmax(-1).gather(-1, sequences[:, 1:, None]).squeeze(-1)[:, -length:]
    weights = torch.randn(logps.shape, generator=torch.Generator().manual_seed(2)) * (sequences[:, -length:] != 0)
    (logps * weights).sum().div(len(sequences)).backward()
    return logits.detach(), {name: value.grad for name, value in net.named_parameters() if value.requires_grad}


def adapters(kind: str, case: str, fast: Callable[..., Any], checkpointing: Any = False) -> tuple[Any, Any]:
    """The plain model and Unsloth's, each with its own LoRA of the same weights."""
    from unsloth import FastLanguageModel

    net = cases.model(kind, case)
    quick = FastLanguageModel.get_peft_model(fast(net), use_gradient_checkpointing=checkpointing, **cases.LORA)
    config = peft.LoraConfig(**cases.LORA, task_type="CAUSAL_LM", modules_to_save=cases.own_names(net) or None)
    plain = peft.get_peft_model(net, config)
    for model in (plain, quick):
        cases.lively(model)
    return plain.train(), quick


def assert_close(found: torch.Tensor | None, wanted: torch.Tensor | None, name: str) -> None:
    assert (found is None) == (wanted is None), name
    if found is not None and wanted is not None:
        allowed = TOLERANCE * max(FLOOR, wanted.abs().max().item())
        assert (found - wanted).abs().max().item() <= allowed, name


@by_turns
def test_a_rollout_is_the_plain_one(kind: str, case: str, fast: Callable[..., Any]) -> None:
    net = cases.model(kind, case)
    wanted, plain_state = roll_out(net, case)
    found, state = roll_out(fast(net), case)
    assert torch.equal(found, wanted)
    assert (state.rollout_logps - plain_state.rollout_logps).abs().max() < TOLERANCE
    if state.bag_ids is not None:
        assert (state.bag_weights > 0).any() and torch.equal(state.bag_ids, plain_state.bag_ids)
        assert (state.bag_weights - plain_state.bag_weights).abs().max() < TOLERANCE
    for name, value in plain_state.statistics.items():
        assert_close(state.statistics[name], value, name)


@by_turns
def test_logits_and_gradients_are_the_plain_ones(kind: str, case: str, fast: Callable[..., Any]) -> None:
    plain, quick = adapters(kind, case, fast)
    prompts = PROMPTS.clone()
    prompts[prompts == 0] = 3  # Unsloth trains on rows that begin with their first token
    sequences, state = roll_out(plain.eval(), case, prompts, SHORT)
    inputs = scoring_inputs(sequences, state, case)
    wanted = gradients(plain.train(), sequences, inputs)
    found = gradients(quick, sequences, scoring_inputs(sequences, state, case))
    real = sequences != 0
    assert_close(found[0][real], wanted[0][real], "logits")
    assert found[1].keys() == wanted[1].keys()
    for name, value in wanted[1].items():
        assert_close(found[1][name], value, name)
    own = [name for name in found[1] if any(part in name for part in cases.own_names(plain.get_base_model()))]
    assert bool(own) == (case not in ("none", "m3po"))
    assert all(wanted[1][name] is not None and wanted[1][name].abs().max() > 1e-4 for name in own)
    # The rollout's own log-probs: the pass scores what was sampled.
    logps = found[0][:, :-1].log_softmax(-1).gather(-1, sequences[:, 1:, None]).squeeze(-1)[:, PROMPTS.shape[1] - 1 :]
    scored = sequences[:, PROMPTS.shape[1] :] != 0
    assert (logps - state.rollout_logps)[scored].abs().max() < TOLERANCE


@pytest.mark.parametrize(("kind", "checkpointing"), [("llama", True), ("qwen2", "unsloth")])
def test_gradient_checkpointing_changes_no_gradient(kind: str, checkpointing: Any, fast: Callable[..., Any]) -> None:
    case = "h3po-aslr"
    plain, quick = adapters(kind, case, fast, checkpointing)
    prompts = PROMPTS.clamp_min(3)
    sequences, state = roll_out(plain.eval(), case, prompts, SHORT)
    inputs = scoring_inputs(sequences, state, case)
    wanted = gradients(plain.train(), sequences, inputs)[1]
    found = gradients(quick, sequences, scoring_inputs(sequences, state, case))[1]
    for name, value in wanted.items():
        assert_close(found[name], value, name)


# The captured decode step. Graphs are captured on CUDA alone: the mock of `decode_step` does what a replay does, as far
# as our hooks can tell: it runs the step without the extra arguments of the forward, on whatever lies in the buffer.


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """Turns graphs on; one entry a replayed step, the address of the buffer it read, None without."""
    from unsloth.models import _decode_graphs

    places: list[int | None] = []

    def replay(model: Any, forward: Any, logits_of: Any, mask_of: Any, ids: Any, cache: Any, places_: Any, mask: Any):
        buffer = model.model.__dict__["_m3po_step"]
        places.append(None if buffer is None else buffer.data_ptr())
        found = forward(model, ids, cache, position_ids=places_, attention_mask=mask)
        return logits_of(model, found[0]), found[1]

    monkeypatch.setattr(_decode_graphs, "enabled", lambda: True)
    monkeypatch.setattr(_decode_graphs, "start_generation", lambda length: None)
    monkeypatch.setattr(_decode_graphs, "end_generation", lambda: None)
    monkeypatch.setattr(_decode_graphs, "decode_step", replay)
    return places


@pytest.mark.parametrize("case", ["none", "h3po", "m3po-luong", "h3po-aslr"])
def test_a_replayed_rollout_is_the_plain_one(case: str, fast: Callable[..., Any], replays: list[int | None]) -> None:
    net = cases.model("llama", case)
    wanted, plain_state = roll_out(net, case)
    found, state = roll_out(fast(net), case)
    assert torch.equal(found, wanted)
    assert (state.rollout_logps - plain_state.rollout_logps).abs().max() < TOLERANCE
    for name, value in plain_state.statistics.items():
        assert torch.allclose(state.statistics[name], value, atol=TOLERANCE), name
    if case == "h3po-aslr":
        assert not replays
    else:
        assert len(replays) > 5 and len(set(replays)) == 1 and (replays[0] is None) == (case == "none")


def test_steps_without_bags_read_their_tokens_from_the_buffer_once_there_is_one(
    fast: Callable[..., Any], replays: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from unsloth.models import _decode_graphs

    dropped: list[Any] = []
    monkeypatch.setattr(_decode_graphs, "invalidate", dropped.append)
    net = cases.model("llama", "m3po")
    quick = fast(net)
    plain = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    mask = (PROMPTS != 0).long()
    wanted = net.generate(input_ids=PROMPTS, attention_mask=mask, **plain)
    assert torch.equal(quick.generate(input_ids=PROMPTS, attention_mask=mask, **plain), wanted)
    assert set(replays) == {None} and not dropped  # a graph captured now would read no buffer
    roll_out(quick, "m3po")
    assert dropped == [quick]
    replays.clear()
    assert torch.equal(quick.generate(input_ids=PROMPTS, attention_mask=mask, **plain), wanted)
    assert len(set(replays)) == 1 and None not in replays and len(dropped) == 1


def test_with_graphs_off_again_no_buffer_is_read(
    fast: Callable[..., Any], replays: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from unsloth.models import _decode_graphs

    net = cases.model("llama", "m3po")
    quick = fast(net)
    wanted = roll_out(net, "m3po")[0]
    roll_out(quick, "m3po")
    monkeypatch.setattr(_decode_graphs, "enabled", lambda: False)
    replays.clear()
    assert torch.equal(roll_out(quick, "m3po")[0], wanted) and not replays
