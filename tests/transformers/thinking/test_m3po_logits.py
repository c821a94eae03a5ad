# SPDX-License-Identifier: Apache-2.0
"""`apply_m3po_to_logits` against eq. 3 to 6 on output distributions in float64, position by position."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from reference import learnable_gates as reference
from transformers.m3po.gating import create_gating_function
from transformers.m3po.thinking import logits as module
from transformers.m3po.thinking.logits import apply_m3po_to_logits

VOCAB, LENGTH, HIDDEN = 12, 7, 5
GROUPS = torch.tensor([7, 2, 7, 4, 2, 7])  # sizes 3, 2 and 1
GATES = ("baseline", "raw_dot", "luong", "bahdanau")
SIZES = {"luong": {"vocab_size": VOCAB, "rank": 8}, "bahdanau": {"vocab_size": VOCAB, "attention_dim": 8}}
TEMPERATURE = 0.2

pytestmark = pytest.mark.usefixtures("one_thread")


def inputs(scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, T, V) and who thinks: in the first position nobody, in the second one of each group, later many."""
    g = torch.Generator().manual_seed(4)
    logits = scale * torch.randn(len(GROUPS), LENGTH, VOCAB, generator=g)
    thinking = torch.rand(len(GROUPS), LENGTH, generator=g) < 0.7
    thinking[:, 0] = False
    thinking[:, 1] = torch.tensor([True, True, False, True, False, False])
    thinking[:, 2] = True
    return logits, thinking


def made(name: str) -> Any:
    gate = create_gating_function(name, SIZES.get(name))
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=g))
    return gate


def parameters(gate: Any) -> dict[str, torch.Tensor]:
    return {key: value.detach().double().requires_grad_() for key, value in gate.named_parameters()}


def similarity_of(name: str, given: dict[str, torch.Tensor]) -> reference.Similarity:
    if name == "baseline":
        return reference.cosine
    return reference.dot if name == "raw_dot" else partial(reference.similarity, name, given)


def listens(thinking: torch.Tensor) -> torch.Tensor:
    """(B, T) bool, by counting."""
    return torch.stack(
        [
            torch.stack([thinking[i, t] & (thinking[group == GROUPS, t].sum() > 1) for t in range(LENGTH)])
            for i, group in enumerate(GROUPS)
        ]
    )


@pytest.mark.parametrize("name", GATES)
def test_the_blend_is_the_formula(name: str) -> None:
    for lambda_blend in (0.1, 0.5, 1.0):
        for dtype in (torch.float32, torch.bfloat16):
            check_the_blend_is_the_formula(name, lambda_blend, dtype)


def check_the_blend_is_the_formula(name: str, lambda_blend: float, dtype: torch.dtype) -> None:
    logits, thinking = inputs()
    logits, gate = logits.to(dtype), made(name)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        mine = apply_m3po_to_logits(logits, GROUPS, thinking, gate, lambda_blend, TEMPERATURE)
    assert mine.shape == logits.shape and mine.dtype == torch.float32
    args = (GROUPS.tolist(), thinking, similarity_of(name, parameters(gate)), lambda_blend, TEMPERATURE)
    torch.testing.assert_close(mine.double(), reference.blended_log_probs(logits, *args), atol=2e-5, rtol=0)
    torch.testing.assert_close(mine.double().exp().sum(-1), torch.ones(6, LENGTH).double(), atol=2e-6, rtol=0)


def test_no_gate_is_the_baseline() -> None:
    logits, thinking = inputs()
    mine, plain = (apply_m3po_to_logits(logits, GROUPS, thinking, gate) for gate in (None, made("baseline")))
    assert torch.equal(mine, plain)
    args = (GROUPS.tolist(), thinking, reference.cosine, 0.1, 0.1)
    torch.testing.assert_close(mine.double(), reference.blended_log_probs(logits, *args), atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", GATES)
def test_who_hears_nobody_keeps_its_own_bit_for_bit(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check_who_hears_nobody_keeps_its_own_bit_for_bit(name, dtype)


def check_who_hears_nobody_keeps_its_own_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    logits, thinking = inputs()
    logits = logits.to(dtype)
    own, hears = logits.float().log_softmax(-1), listens(thinking)
    assert 3 < hears.sum() < hears.numel() - 3 and (thinking & ~hears).sum() > 3
    mine = apply_m3po_to_logits(logits, GROUPS, thinking, made(name), 0.5, TEMPERATURE)
    assert torch.equal(mine[~hears], own[~hears])
    assert (mine[hears] - own[hears]).abs().amax(-1).min() > 1e-3
    assert torch.equal(apply_m3po_to_logits(logits, GROUPS, thinking, made(name), 0.0, TEMPERATURE), own)


@pytest.mark.parametrize("positions", [1, 2, 3, 6])
@pytest.mark.parametrize("name", GATES)
def test_chunks_change_no_bit(name: str, positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, thinking = inputs()
    gate = made(name)

    def both() -> list[torch.Tensor]:
        gate.zero_grad()
        given = logits.clone().requires_grad_()
        found = apply_m3po_to_logits(given, GROUPS, thinking, gate, 0.5, TEMPERATURE)
        (found * pull).sum().backward()
        return [found.detach(), given.grad]

    pull = torch.randn(logits.shape)
    whole = both()
    lengths, blend = [], module._blend

    def counted(*args: Any) -> torch.Tensor:
        lengths.append(args[-1].shape[1])
        return blend(*args)

    monkeypatch.setattr(module, "_blend", counted)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", positions * len(GROUPS) * VOCAB + 1)
    chunked = both()
    expected = [positions] * (LENGTH // positions) + ([LENGTH % positions] if LENGTH % positions else [])
    assert lengths[: len(expected)] == expected, "not chunked as asked"
    assert torch.equal(whole[0], chunked[0]) and torch.equal(whole[1], chunked[1])


@pytest.mark.parametrize("positions", [2, LENGTH])
@pytest.mark.parametrize("name", GATES)
def test_gradients_are_those_of_the_formula(name: str, positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", positions * len(GROUPS) * VOCAB)
    logits, thinking = inputs()
    gate, pull = made(name), torch.randn(logits.shape)
    mine = logits.clone().requires_grad_()
    (apply_m3po_to_logits(mine, GROUPS, thinking, gate, 0.5, TEMPERATURE) * pull).sum().backward()
    wide, given = logits.double().requires_grad_(), parameters(gate)
    args = (GROUPS.tolist(), thinking, similarity_of(name, given), 0.5, TEMPERATURE)
    (reference.blended_log_probs(wide, *args) * pull).sum().backward()
    torch.testing.assert_close(mine.grad.double(), wide.grad, atol=1e-4, rtol=1e-4)
    for key, value in gate.named_parameters():
        assert given[key].grad.abs().max() > 1e-3, key
        torch.testing.assert_close(value.grad.double(), given[key].grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["luong", "bahdanau"])
def test_a_gate_behind_embeddings_learns_and_its_gradients_are_those_of_the_formula(name: str) -> None:
    options = SIZES[name] | {"hidden_size": HIDDEN, "project_embeddings": True}
    gate, table = create_gating_function(name, options), torch.nn.Embedding(VOCAB, HIDDEN)
    gate.start(torch.Generator().manual_seed(0), table)
    logits, thinking = inputs()
    pull = torch.randn(logits.shape)
    mine = logits.clone().requires_grad_()
    through = partial(gate, embed_tokens=table)
    (apply_m3po_to_logits(mine, GROUPS, thinking, through, 0.5, TEMPERATURE) * pull).sum().backward()
    wide, given = logits.double().requires_grad_(), parameters(gate)
    behind = (gate.token_scale, table.weight, gate.whitening)
    similarity = partial(reference.similarity, name, given, behind=behind)
    (reference.blended_log_probs(wide, GROUPS.tolist(), thinking, similarity, 0.5, TEMPERATURE) * pull).sum().backward()
    assert table.weight.grad is None
    for key, value in gate.named_parameters():
        size = given[key].grad.abs().max()
        assert size > 1e-3, key
        torch.testing.assert_close(value.grad.double(), given[key].grad, atol=1e-4 * float(size), rtol=1e-3)
    torch.testing.assert_close(mine.grad.double(), wide.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", GATES)
def test_gradients_are_finite_at_extreme_logits(name: str) -> None:
    for kind in ("one-hot", "identical", "all the same token", "uniform", "mixed"):
        for temperature in (TEMPERATURE, "match"):
            check_gradients_are_finite_at_extreme_logits(name, kind, temperature)


def check_gradients_are_finite_at_extreme_logits(name: str, kind: str, temperature: Any) -> None:
    logits, thinking = inputs()
    g = torch.Generator().manual_seed(6)
    tokens = torch.randint(VOCAB, logits.shape[:2], generator=g)
    if kind == "all the same token":
        tokens = torch.full_like(tokens, 3)
    sharp = 1e4 * (2 * torch.nn.functional.one_hot(tokens, VOCAB).float() - 1)
    if kind == "identical":
        logits = logits[:1].expand(6, -1, -1)
    elif kind == "uniform":
        logits = torch.zeros_like(logits)
    else:
        logits = torch.where(torch.arange(6).view(-1, 1, 1) % 2 == 0, sharp, logits) if kind == "mixed" else sharp
    for groups in (GROUPS, torch.zeros_like(GROUPS)):
        gate, given = made(name), logits.clone().requires_grad_()
        mine = apply_m3po_to_logits(given, groups, thinking, gate, 0.5, temperature)
        assert not torch.isnan(mine).any()
        torch.testing.assert_close(mine.exp().sum(-1), torch.ones(6, LENGTH), atol=1e-5, rtol=0)
        mine.gather(-1, tokens.unsqueeze(-1)).sum().backward()
        grads = [given.grad, *[value.grad for value in gate.parameters()]]
        assert all(torch.isfinite(grad).all() and grad.abs().max() < 1e7 for grad in grads)


def test_match_is_worked_out_position_by_position() -> None:
    logits, thinking = inputs()
    gate = made("raw_dot")
    mine = apply_m3po_to_logits(logits, GROUPS, thinking, gate, 0.5, "match")
    scaled = apply_m3po_to_logits(logits, GROUPS, thinking, create_gating_function("scaled_dot"), 0.5, "match")
    torch.testing.assert_close(mine, scaled, atol=1e-3, rtol=0)
    alone = [
        apply_m3po_to_logits(logits[:, t : t + 1], GROUPS, thinking[:, t : t + 1], gate, 0.5, "match")
        for t in range(LENGTH)
    ]
    assert torch.equal(mine, torch.cat(alone, dim=1))
    assert not torch.equal(mine, apply_m3po_to_logits(logits, GROUPS, thinking, gate, 0.5, 0.1))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lambda_blend": 1.5}, r"lambda_blend=1.5 is outside \[0, 1\]"),
        ({"lambda_blend": -0.1}, r"lambda_blend=-0.1 is outside \[0, 1\]"),
        ({"temperature": 0.0}, "temperature=0.0 .*'match'"),
        ({"temperature": "best"}, "temperature=best .*'match'"),
    ],
)
def test_numbers_out_of_range_are_refused_in_one_line(given: dict[str, Any], said: str) -> None:
    logits, thinking = inputs()
    with pytest.raises(ValueError, match=said) as error:
        apply_m3po_to_logits(logits, GROUPS, thinking, **given)
    assert "\n" not in str(error.value)
