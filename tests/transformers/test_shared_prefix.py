# SPDX-License-Identifier: Apache-2.0
"""A pass over a stream that holds each prompt once is the pass over the rows: states, log-probs and gradients.

The rows are read by upstream's own forward with the rollout's position ids, in float64, where the two may differ by
rounding alone. Prompts are of different length and padded on the left, completions end at different places; in half of
the cases the prompts begin alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import hyper_models
from reference.families import FAMILIES
from reference.tiny import LIVELY, left_padded
from transformers.m3po.aslr.modules import ASLR_MODULES, attach_aslr
from transformers.m3po.shared_prefix import SharedPrefix, common_length, share_prefix, shared_prefill, split_rows
from transformers.m3po.thinking.residual_gate import attach_residual_gate

PATHS, RESTS, COMPLETION = 3, [9, 4, 6], 7
ROWS = PATHS * len(RESTS)
ALIKE = 18  # tokens that the prompts have in common


def prompts(alike: int, rests: list[int] = RESTS) -> dict[str, torch.Tensor]:
    """Three prompts (9, L), each three times, whose first tokens are the same."""
    single = left_padded([alike + rest for rest in rests])
    ids, mask = single["input_ids"], single["attention_mask"]
    place = (mask.cumsum(-1) - 1).clamp_min(0)
    same = torch.randint(130, 256, (max(rests) + alike,), generator=torch.Generator().manual_seed(7))
    ids = torch.where((place < alike) & (mask == 1), same[place], ids)
    return {"input_ids": ids.repeat_interleave(PATHS, 0), "attention_mask": mask.repeat_interleave(PATHS, 0)}


@pytest.fixture(params=[0, ALIKE], ids=["different prompts", "prompts that begin alike"])
def rows(request: pytest.FixtureRequest) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask (9, L + 7): three prompts, with three completions of each that end somewhere."""
    return with_completions(prompts(request.param))


def with_completions(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Prompts (9, L) with completions (9, 7) that end somewhere."""
    draws = torch.Generator().manual_seed(5)
    tokens = torch.randint(130, 256, (ROWS, COMPLETION), generator=draws)
    lengths = torch.tensor([7, 1, 4, 7, 7, 2, 3, 6, 5])
    mask = (torch.arange(COMPLETION) < lengths[:, None]).long()
    return {
        "input_ids": torch.cat([given["input_ids"], tokens * mask], 1),
        "attention_mask": torch.cat([given["attention_mask"], mask], 1),
    }


def bags() -> dict[str, torch.Tensor]:
    """Bags of four tokens; a third of the positions have none."""
    draws = torch.Generator().manual_seed(6)
    weights = torch.rand(ROWS, COMPLETION, 4, generator=draws)
    weights = weights / weights.sum(-1, keepdim=True) * (torch.rand(ROWS, COMPLETION, 1, generator=draws) < 0.66)
    ids = torch.randint(3, 256, (ROWS, COMPLETION, 4), generator=draws).int()
    return {"thinking_bag_ids": ids, "thinking_bag_weights": weights}


def with_aslr(model: Any) -> Any:
    """The model with modules of ASLR as if trained."""
    attach_aslr(model)
    draws = torch.Generator().manual_seed(1)
    for name in ASLR_MODULES:
        for value in getattr(model.model, name).parameters():
            value.data += 0.2 * torch.randn(value.shape, generator=draws)
    return model


def with_gate(model: Any) -> Any:
    """The model with a residual gate that lets much of a thought in."""
    attach_residual_gate(model, r_min=0.3, r_max=0.6, seed=1)
    return model


SEEDS = {"aslr_row_seeds": torch.arange(ROWS) + 11, "is_m3po_inference": False}
CASES: dict[str, tuple[Callable[[Any], Any], Callable[[], dict[str, Any]]]] = {
    "plain": (lambda model: model, dict),
    "bags": (lambda model: model, bags),
    "bags and residual gate": (with_gate, bags),
    "bags and ASLR": (with_aslr, lambda: bags() | SEEDS),
}


def states_of_rows(model: Any, rows: dict[str, torch.Tensor], more: dict[str, Any]) -> torch.Tensor:
    """(B, 1 + C, H) by upstream's forward over the rows, as every pass without the flag."""
    positions = (rows["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    states = model.model(**rows, position_ids=positions, **more, use_cache=False).last_hidden_state
    return states[:, -COMPLETION - 1 :]


def states_of_stream(model: Any, rows: dict[str, torch.Tensor], more: dict[str, Any], **changes: Any) -> torch.Tensor:
    """(B, 1 + C, H) by a forward over the stream, whose inputs `changes` may replace."""
    stream = share_prefix(rows["input_ids"], rows["attention_mask"], COMPLETION, PATHS)
    return model.model(**(stream | more | changes), use_cache=False).last_hidden_state


def gradients(model: Any, states: torch.Tensor, rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of the log-probs of the completions, each with a weight of its own."""
    model.zero_grad()
    targets, mask = (rows[name][:, -COMPLETION:] for name in ("input_ids", "attention_mask"))
    logps = model.lm_head(states[:, :-1]).log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    weights = torch.randn(ROWS, COMPLETION, generator=torch.Generator().manual_seed(8)).to(logps.dtype)
    (logps * mask * weights).sum().backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def scored(states: torch.Tensor, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """The states that predict a token."""
    return states[:, :-1][rows["attention_mask"][:, -COMPLETION:].bool()]


def check_equal(model: Any, rows: dict[str, torch.Tensor], more: dict[str, Any], bound: float) -> None:
    """States and gradients of the two passes differ by less than `bound` of the largest entry."""
    expected, shared = states_of_rows(model, rows, more), states_of_stream(model, rows, more)
    assert shared.shape == expected.shape
    gap = scored(shared - expected, rows).abs().max() / scored(expected, rows).abs().max()
    assert gap < bound
    wanted, given = gradients(model, expected, rows), gradients(model, shared, rows)
    assert wanted.keys() == given.keys()
    for name, gradient in wanted.items():
        assert (given[name] - gradient).abs().max() <= bound * gradient.abs().max() + 1e-12, name


@pytest.mark.all_families
@pytest.mark.parametrize("case", CASES)
def test_states_and_gradients_are_those_of_the_rows_in_float64(family: Any, rows: dict[str, torch.Tensor], case: str):
    change, more = CASES[case]
    # Norms, bags, the residual gate and ASLR sum in float32 whatever the model's dtype: that is what is left.
    check_equal(change(family(**LIVELY)).double(), rows, more(), 1e-5)


@pytest.mark.all_families
@pytest.mark.parametrize("case", CASES)
def test_they_are_in_float32(family: Any, rows: dict[str, torch.Tensor], case: str):
    change, more = CASES[case]
    check_equal(change(family(**LIVELY)), rows, more(), 1e-4)


@pytest.mark.all_families
def test_they_are_for_prompts_without_padding_which_need_no_mask(family: Any):
    rows = with_completions(prompts(0, [6, 6, 6]))
    stream = share_prefix(rows["input_ids"], rows["attention_mask"], COMPLETION, PATHS)
    shared = stream["shared_prefix"]
    assert shared.prompt_mask is None
    model = family(**LIVELY).double()
    check_equal(model, rows, bags(), 1e-5)
    everything = torch.ones(len(RESTS), 1, 6, 6, dtype=torch.bool)  # a prompt that reads what follows is another one
    seen = states_of_stream(model, rows, bags(), shared_prefix=shared._replace(prompt_mask=everything))
    assert scored(seen - states_of_rows(model, rows, bags()), rows).abs().max() > 1e-2


@pytest.mark.parametrize("architecture", [name for name, _ in FAMILIES.values()])
def test_they_are_with_hyper_connections(rows: dict[str, torch.Tensor], architecture: str):
    check_equal(hyper_models.trained(architecture).double(), rows, bags(), 1e-5)


def test_they_are_with_gradient_checkpointing(tiny_llama: Any, rows: dict[str, torch.Tensor]):
    model = tiny_llama(**LIVELY).train()
    expected = gradients(model, states_of_rows(model, rows, bags()), rows)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, gradient in gradients(model, states_of_stream(model, rows, bags()), rows).items():
        assert (gradient - expected[name]).abs().max() <= 1e-4 * expected[name].abs().max(), name


@pytest.mark.slow
@pytest.mark.parametrize("rows", [ALIKE], indirect=True)
def test_they_are_in_a_compiled_model_without_a_graph_break(tiny_llama: Any, rows: dict[str, torch.Tensor]):
    model = tiny_llama(**LIVELY)
    expected = states_of_rows(model, rows, bags())
    model.model.forward = torch.compile(model.model.forward, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        scored(states_of_stream(model, rows, bags()), rows), scored(expected, rows), atol=1e-4, rtol=1e-4
    )


def wrong_position(stream: dict[str, Any]) -> dict[str, Any]:
    """Completions that begin at the width of the prompts, not at the length of their own."""
    positions, shared = stream["position_ids"].clone(), stream["shared_prefix"]
    width = shared.common_length + shared.rest_length
    positions[:, shared.prompt_tokens :] = (width + torch.arange(COMPLETION)).repeat(ROWS)
    return {"position_ids": positions}


def wrong_mask(stream: dict[str, Any]) -> dict[str, Any]:
    """Completions that read the padding of their prompt."""
    mask = stream["attention_mask"].clone()
    mask[..., :-COMPLETION] = True
    return {"attention_mask": mask}


def wrong_group(stream: dict[str, Any]) -> dict[str, Any]:
    """Completions that read the prompt of another group."""
    ids, shared = stream["input_ids"].clone(), stream["shared_prefix"]
    at = slice(shared.common_length, shared.prompt_tokens)
    ids[:, at] = ids[:, at].roll(shared.rest_length, 1)
    return {"input_ids": ids}


def wrong_bags(stream: dict[str, Any]) -> dict[str, Any]:
    """Bags of the next row."""
    return {name: value.roll(1, 0) for name, value in bags().items()}


def wrong_end(stream: dict[str, Any]) -> dict[str, Any]:
    """Completions that read behind themselves."""
    return {"attention_mask": torch.ones_like(stream["attention_mask"])}


@pytest.mark.parametrize("wrong", [wrong_position, wrong_mask, wrong_group, wrong_bags, wrong_end])
def test_what_is_wrong_in_a_stream_is_far_above_the_bound(tiny_llama: Any, rows: dict[str, torch.Tensor], wrong: Any):
    model = tiny_llama(**LIVELY)
    stream = share_prefix(rows["input_ids"], rows["attention_mask"], COMPLETION, PATHS)
    with torch.no_grad():
        expected = states_of_rows(model, rows, bags())
        shared = states_of_stream(model, rows, bags(), **wrong(stream))
    assert scored(shared - expected, rows).abs().max() > 1e-2


def test_a_stream_holds_each_token_once_and_the_rows_are_taken_out_of_it_in_their_order(rows: dict[str, torch.Tensor]):
    stream = share_prefix(rows["input_ids"], rows["attention_mask"], COMPLETION, PATHS)
    width = rows["input_ids"].shape[1] - COMPLETION
    alike = width - max(RESTS)
    assert stream["shared_prefix"].common_length == alike
    tokens = alike + len(RESTS) * max(RESTS) + ROWS * COMPLETION
    assert stream["input_ids"].shape == stream["position_ids"].shape == (1, tokens)
    ids, positions = split_rows(stream["input_ids"], stream["position_ids"], stream)
    assert torch.equal(ids, rows["input_ids"][:, width - 1 :])
    assert torch.equal(positions, (rows["attention_mask"].cumsum(-1) - 1)[:, width - 1 :])
    assert torch.equal(stream["input_ids"][0, :width], rows["input_ids"][0, :width])  # the longest prompt is the first


def test_what_prompts_have_in_common_ends_before_the_last_token_of_the_shortest():
    def length(*rows: list[int]) -> int:
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return common_length(ids, mask)

    long = [*range(1, 31)]
    assert length(long, long[:20]) == 19
    assert length(long, [*long[:25], 99, 98]) == 25
    assert length(long, long) == 29
    assert length(long[:20], [*long[:15], 77, 78, 79]) == 0  # fewer than it pays for
    assert length(long, [99, *long]) == 0
    assert length(long) == 0


def test_without_a_stream_the_very_tensors_come_back():
    states, positions = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    given = split_rows(states, positions, {})
    assert given[0] is states and given[1] is positions


def test_rows_that_are_not_whole_groups_and_other_attention_are_refused(tiny_llama: Any, rows: dict[str, torch.Tensor]):
    with pytest.raises(ValueError, match="9 rows are not whole groups of 4"):
        share_prefix(rows["input_ids"], rows["attention_mask"], COMPLETION, 4)
    with pytest.raises(ValueError, match="shared_prefix needs attn_implementation='sdpa'; this model has 'eager'"):
        states_of_stream(tiny_llama(attn_implementation="eager"), rows, {})


@pytest.mark.all_families
@pytest.mark.parametrize("alike", [0, ALIKE])
def test_a_rollout_from_a_shared_prefill_has_the_tokens_and_log_probs_of_one_that_reads_every_row(
    family: Any, alike: int
):
    model, given = family(**LIVELY), prompts(alike)
    options = {"max_new_tokens": 8, "do_sample": True, "output_logits": True, "return_dict_in_generate": True}
    torch.manual_seed(3)
    expected = model.generate(**given, **options)
    calls: list[torch.Size] = []
    model.model.register_forward_pre_hook(
        lambda module, given, kwargs: calls.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    shared = shared_prefill(model, given["input_ids"], given["attention_mask"], PATHS)
    torch.manual_seed(3)
    rollout = model.generate(**given | shared, **options)
    reads = [(1, alike)] if alike else []
    assert calls[: len(reads) + 2] == [*reads, (len(RESTS), max(RESTS) - 1), (ROWS, 1)]
    width = given["input_ids"].shape[1]
    assert torch.equal(rollout.sequences[:, width:], expected.sequences[:, width:])
    torch.testing.assert_close(torch.stack(rollout.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)


def test_prompts_that_are_equal_but_for_their_last_token_are_read_in_one_row(tiny_llama: Any):
    model = tiny_llama(**LIVELY)
    ids = torch.arange(100, 120).repeat(2, 1)
    ids[1, -1] = 7
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    shared = shared_prefill(model, **given, num_paths=1)
    assert shared["past_key_values"].get_seq_length() == 19
    expected = model.generate(**given, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(**given | shared, max_new_tokens=4, do_sample=False), expected)


def test_a_prompt_of_one_token_is_read_by_generate_itself(tiny_llama: Any):
    assert shared_prefill(tiny_llama(), torch.full((4, 1), 7), torch.ones(4, 1).long(), 2) == {}


def test_prompts_that_have_nothing_in_common_are_left_to_generate(tiny_llama: Any):
    assert shared_prefill(tiny_llama(), **left_padded(RESTS), num_paths=1) == {}


def test_what_an_attention_call_gets_does_not_grow_with_the_square_of_the_stream(
    tiny_llama: Any, rows: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
):
    shapes: set[tuple[int, ...]] = set()
    heads: set[tuple[int, int]] = set()
    plain = torch.nn.functional.scaled_dot_product_attention

    def counted(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **more: Any) -> torch.Tensor:
        shapes.add((query.shape[0], query.shape[2], key.shape[2]))
        heads.add((query.shape[1], key.shape[1]))
        return plain(query, key, value, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    states_of_stream(tiny_llama(), rows, {})
    length = rows["input_ids"].shape[1]
    alike = length - COMPLETION - max(RESTS)
    common = {(1, alike, alike)} if alike else set()
    assert shapes == common | {(len(RESTS), max(RESTS), alike + max(RESTS)), (ROWS, COMPLETION, length)}
    assert heads == {(4, 2)}  # no key is copied for the heads that share it


def test_the_stream_travels_through_what_wraps_a_model():
    """Named tuples keep their type where DDP moves inputs to a device; another class would not be looked at."""
    from torch.distributed.utils import _to_kwargs

    shared = SharedPrefix(0, 1, 2, 3, torch.zeros(1, 1, 2, 2, dtype=torch.bool))
    _, (moved,) = _to_kwargs((), {"shared_prefix": shared}, torch.device("cpu"), False)
    assert isinstance(moved["shared_prefix"], SharedPrefix) and moved["shared_prefix"].num_paths == 3
