# SPDX-License-Identifier: Apache-2.0
"""`recompute_bag_weights` and `recompute_blend_weights`: the bags of a rollout once more, from its record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from reference import learnable_gates as reference
from transformers.m3po import PathGroups, ThinkingSettings
from transformers.m3po.gating import create_gating_function
from transformers.m3po.generation.rollout import ThinkingRollout
from transformers.m3po.thinking import policy_gating
from transformers.m3po.thinking.bags import cross_path_bags, select_peers
from transformers.m3po.thinking.interaction import path_attention
from transformers.m3po.thinking.policy_gating import recompute_bag_weights
from transformers.m3po.thinking.record import GatingRecord, RolloutRecord
from transformers.m3po.thinking.thoughts import blend_thoughts, recompute_blend_weights, top_k_tokens

VOCAB, HIDDEN, STEPS, TOP_K, LAMBDA = 24, 6, 9, 4, 0.4
GROUPS = torch.tensor([7, 2, 7, 4, 2, 7, 7])  # sizes 4, 2 and 1
GATES = ("luong", "bahdanau")
SIZES = {"luong": {"rank": 4}, "bahdanau": {"attention_dim": 4}}
EACH = pytest.mark.parametrize("name", GATES)
MODES = pytest.mark.parametrize("mode", ["m3po", "h3po"])
TEMPERATURES = pytest.mark.parametrize("temperature", [0.2, "match"])
# Any two of these values meet in one of the rows: temperature, top_k_peers, mode, projects, name.
ROWS = [
    (0.2, None, "m3po", False, "luong"),
    ("match", None, "h3po", True, "bahdanau"),
    (0.2, 2, "h3po", True, "luong"),
    ("match", 2, "m3po", False, "bahdanau"),
    (0.2, 1, "m3po", True, "bahdanau"),
    ("match", 1, "h3po", False, "luong"),
]
PAIRWISE = pytest.mark.parametrize(("temperature", "top_k_peers", "mode", "projects", "name"), ROWS)

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Rolled:
    """A rollout by hand: its bags (B, T, K), its record and which paths were active (B, T)."""

    gate: Any
    table: torch.nn.Embedding | None
    bag_ids: torch.Tensor
    bag_weights: torch.Tensor
    record: GatingRecord
    active: torch.Tensor
    thoughts: bool
    groups: torch.Tensor

    def regated(self, gate: Any = None) -> torch.Tensor:
        given = (self.bag_ids, self.bag_weights, self.record, self.groups, LAMBDA, self.thoughts)
        return recompute_bag_weights(gate or self.gate, self.table, *given)


def made(name: str, projects: bool = False) -> tuple[Any, torch.nn.Embedding | None]:
    options: dict[str, Any] = {"vocab_size": VOCAB, **SIZES[name]}
    table = None
    if projects:
        options |= {"project_embeddings": True, "hidden_size": HIDDEN}
        table = torch.nn.Embedding(VOCAB, HIDDEN)
    gate = create_gating_function(name, options)
    change(gate, 8)
    return gate, table


def change(gate: Any, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=g))


def distributions() -> torch.Tensor:
    """(T, B, V) float32: ordinary, with the zeros of a cut sampling distribution, one-hot, identical in a group."""
    g = torch.Generator().manual_seed(2)
    logits = 2 * torch.randn(STEPS, len(GROUPS), VOCAB, generator=g)
    logits[..., 0] += 2  # token 0 is a token like others, and what padding repeats
    cut = logits < logits.topk(2, dim=-1).values[..., -1:]  # two tokens are left, fewer than a bag has entries
    logits[3:5] = logits[3:5].masked_fill(cut[3:5], -torch.inf)
    probs = logits.softmax(-1)
    probs[5] = torch.eye(VOCAB)[torch.arange(len(GROUPS)) % 3]
    probs[6] = probs[6, :1]
    return probs


def activity() -> torch.Tensor:
    """(T, B) bool: all, some, nobody, one path of each group."""
    active = torch.rand(STEPS, len(GROUPS), generator=torch.Generator().manual_seed(3)) < 0.7
    active[0], active[6] = True, True
    active[1] = False
    active[2] = torch.tensor([True, True, False, True, False, False, False])
    return active


def roll_out(
    gate: Any,
    table: torch.nn.Embedding | None,
    mode: str,
    temperature: Any = 0.2,
    top_k_peers: int | None = None,
    top_k: int = TOP_K,
    groups: torch.Tensor = GROUPS,
    num_embeddings: int = VOCAB,
) -> Rolled:
    """What `ThinkingRollout` does at each step, from its parts."""
    paths, rows = PathGroups(groups), len(groups)
    probs, active = distributions()[:, :rows], activity()[:, :rows]
    kept_tokens = min(top_k or VOCAB, VOCAB)
    peers_kept = min(paths.size - 1, top_k_peers or paths.size)
    record = GatingRecord.zeros(rows, STEPS, kept_tokens, peers_kept, torch.device("cpu"))
    bags = []
    for step in range(STEPS):
        kept = top_k_tokens(probs[step], top_k, num_embeddings)

        def sparse(_: torch.Tensor, kept: Any = kept) -> torch.Tensor:
            return gate(paths.split(kept.probs), ids=paths.split(kept.ids), embed_tokens=table)

        with torch.no_grad():
            attention = path_attention(probs[step], active[step], paths, temperature, sparse)
            peers = select_peers(attention.weights, paths, top_k_peers)
            if mode == "h3po":
                ids, weights = blend_thoughts(kept.ids, kept.probs / kept.norm, peers.weights, peers.rows, LAMBDA)
                weights = weights * active[step].unsqueeze(-1)
            else:
                tokens = probs[step].multinomial(1).squeeze(-1)
                ids, weights = cross_path_bags(tokens, peers.weights, peers.rows, LAMBDA)
        scale = torch.as_tensor(attention.temperature)
        record.write(step, kept, peers.slots, scale.flatten()[paths.group] if scale.dim() else scale)
        bags.append((ids, weights))
    ids, weights = (torch.stack(part, dim=1) for part in zip(*bags, strict=True))
    return Rolled(gate, table, ids, weights, record, active.mT, mode == "h3po", groups)


def expected(rolled: Rolled, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """The reference at the recorded tokens and peers, for parameters in float64."""
    name = "luong" if "U" in given else "bahdanau"
    gate, table = rolled.gate, rolled.table
    behind = None if table is None else (gate.token_scale, table.weight, gate.whitening)

    def similarity(ids: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        return reference.similarity(name, given, reference.whole(ids, probs, VOCAB), behind)

    record, steps, groups = rolled.record, [], rolled.groups.tolist()
    stored = [record.ids, record.probs, record.norm, record.slots, record.temperature]
    for t in range(STEPS):
        now = [part[:, t] for part in (rolled.bag_ids, rolled.bag_weights, *stored)]
        flags = rolled.active[:, t].tolist()
        steps.append(reference.step_weights(*now, flags, groups, similarity, LAMBDA, rolled.thoughts))
    return torch.stack(steps, dim=1)


def parameters(gate: Any) -> dict[str, torch.Tensor]:
    return {key: value.detach().double().requires_grad_() for key, value in gate.named_parameters()}


def test_the_rollout_has_all_that_can_go_wrong() -> None:
    rolled = roll_out(*made("luong"), "h3po", top_k_peers=2)
    bag = rolled.bag_weights > 0
    assert (bag.any(-1) & ~bag.all(-1)).any(), "no bag with padding"
    assert ((rolled.bag_ids == 0) & bag).any() and ((rolled.bag_ids == 0) & ~bag & bag.any(-1, keepdim=True)).any()
    both = ((rolled.bag_ids == 0) & bag).any(-1) & ((rolled.bag_ids == 0) & ~bag).any(-1)
    assert both.any(), "no bag with token 0 and with padding"
    assert not bag[:, 1].any() and bag[3, rolled.active[3]].any(-1).all(), "a lone path keeps its thought"
    assert not bag[~rolled.active].any()
    rolled = roll_out(*made("luong"), "m3po")
    heard = (rolled.bag_weights > 0).any(-1)
    assert not heard[3].any() and not heard[:, 2].any() and heard[:, 0][GROUPS != 4].all()


@PAIRWISE
def test_the_gate_of_the_rollout_gives_its_weights_back(
    name: str, projects: bool, mode: str, top_k_peers: int | None, temperature: Any
) -> None:
    rolled = roll_out(*made(name, projects), mode, temperature, top_k_peers)
    mine = rolled.regated()
    assert mine.shape == rolled.bag_weights.shape and mine.dtype == torch.float32
    torch.testing.assert_close(mine, rolled.bag_weights, atol=1e-6, rtol=0)
    assert (mine[rolled.bag_weights == 0] == 0).all()
    torch.testing.assert_close(mine.double(), expected(rolled, parameters(rolled.gate)), atol=2e-6, rtol=0)


@MODES
@pytest.mark.parametrize("top_k", [0, 1, VOCAB + 3])
def test_whole_distributions_and_single_tokens_come_back_too(mode: str, top_k: int) -> None:
    rolled = roll_out(*made("luong"), mode, top_k=top_k)
    torch.testing.assert_close(rolled.regated(), rolled.bag_weights, atol=1e-6, rtol=0)


@MODES
@EACH
def test_tokens_without_an_embedding_are_no_tokens(name: str, mode: str) -> None:
    rolled = roll_out(*made(name), mode, num_embeddings=VOCAB - 7)
    assert (rolled.record.ids < VOCAB - 7).all() and (rolled.record.probs == 0).any()
    torch.testing.assert_close(rolled.regated(), rolled.bag_weights, atol=1e-6, rtol=0)
    change(rolled.gate, 9)
    wanted = expected(rolled, parameters(rolled.gate))
    torch.testing.assert_close(rolled.regated().double(), wanted, atol=2e-6, rtol=0)


@TEMPERATURES
@MODES
def test_a_batch_of_pairs_comes_back(mode: str, temperature: Any) -> None:
    rolled = roll_out(*made("bahdanau"), mode, temperature, groups=torch.tensor([0, 1, 1, 0, 2, 2]))
    torch.testing.assert_close(rolled.regated(), rolled.bag_weights, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("top_k_peers", "mode", "projects", "name"), [row[1:] for row in ROWS])
def test_another_gate_weighs_the_recorded_tokens_and_peers_anew(
    name: str, projects: bool, mode: str, top_k_peers: int | None
) -> None:
    rolled = roll_out(*made(name, projects), mode, top_k_peers=top_k_peers)
    change(rolled.gate, 9)
    mine, given = rolled.regated(), parameters(rolled.gate)
    wanted = expected(rolled, given)
    torch.testing.assert_close(mine.double(), wanted, atol=2e-6, rtol=0)
    if top_k_peers != 1:  # one peer has all the weight whatever the gate says
        assert (mine - rolled.bag_weights).abs().max() > 0.02
    pull = torch.randn(mine.shape)
    (mine * pull).sum().backward()
    (wanted * pull).sum().backward()
    for key, value in rolled.gate.named_parameters():
        size = 1.0 if top_k_peers == 1 else float(given[key].grad.abs().max())
        assert size > 1e-3, key
        torch.testing.assert_close(value.grad.double(), given[key].grad, atol=1e-4 * size, rtol=1e-3)


@pytest.mark.parametrize("mode", ["m3po", "h3po"])
@EACH
def test_gradients_are_finite_differences(name: str, mode: str) -> None:
    rolled = roll_out(*made(name), mode, top_k_peers=2)
    pull = torch.randn(rolled.bag_weights.shape)
    (rolled.regated() * pull).sum().backward()
    given = parameters(rolled.gate)
    for key, value in rolled.gate.named_parameters():
        place = int(value.grad.abs().argmax())
        sums = []
        for step in (1e-5, -1e-5):
            moved = {other: tensor.detach().clone() for other, tensor in given.items()}
            moved[key].view(-1)[place] += step
            sums.append(float((expected(rolled, moved) * pull).sum()))
        slope = (sums[0] - sums[1]) / 2e-5
        assert abs(slope) > 1e-3
        assert abs(float(value.grad.flatten()[place]) - slope) < 1e-3 * abs(slope), key


@TEMPERATURES
@MODES
@EACH
def test_gradients_are_finite_and_none_comes_from_who_hears_nobody(name: str, mode: str, temperature: Any) -> None:
    rolled = roll_out(*made(name), mode, temperature)
    (rolled.regated() * torch.randn(rolled.bag_weights.shape)).sum().backward()
    grads = [value.grad.clone() for value in rolled.gate.parameters()]
    assert all(torch.isfinite(grad).all() and grad.abs().max() < 1e7 for grad in grads)
    rolled.gate.zero_grad()
    rolled.regated()[:, 1:3].sum().backward()  # nobody, and lone paths
    assert all((value.grad == 0).all() for value in rolled.gate.parameters())


@MODES
@EACH
@pytest.mark.parametrize("factor", [-30.0, -3000.0])
def test_a_gate_that_turned_against_the_peers_that_were_kept(name: str, mode: str, factor: float) -> None:
    """Their weights before they are scaled to sum to 1 may be as small as they like."""
    rolled = roll_out(*made(name), mode, top_k_peers=1)
    with torch.no_grad():
        (rolled.gate.U if name == "luong" else rolled.gate.v).mul_(factor)
    mine = rolled.regated()
    torch.testing.assert_close(mine, rolled.bag_weights, atol=1e-6, rtol=0)  # one peer has all the weight
    (mine * torch.randn(mine.shape)).sum().backward()
    assert all(torch.isfinite(value.grad).all() for value in rolled.gate.parameters())


@pytest.mark.parametrize("positions", [1, 2, 4])
@MODES
@EACH
def test_chunks_change_nothing(name: str, mode: str, positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rolled = roll_out(*made(name), mode, top_k_peers=2)
    change(rolled.gate, 9)
    pull = torch.randn(rolled.bag_weights.shape)

    def both() -> list[torch.Tensor]:
        rolled.gate.zero_grad()
        mine = rolled.regated()
        (mine * pull).sum().backward()
        return [mine.detach(), *[value.grad for value in rolled.gate.parameters()]]

    lengths, attention = [], policy_gating._attention

    def counted(*args: Any) -> torch.Tensor:
        lengths.append(args[3].ids.shape[1])
        return attention(*args)

    whole = both()
    monkeypatch.setattr(policy_gating, "_attention", counted)
    monkeypatch.setattr(policy_gating, "CHUNK_ENTRIES", positions * len(GROUPS) * TOP_K * 4 + 1)
    chunked = both()
    assert lengths == [positions] * (STEPS // positions) + ([STEPS % positions] if STEPS % positions else [])
    torch.testing.assert_close(chunked, whole, atol=1e-6, rtol=1e-5)


@MODES
@EACH
def test_groups_may_be_scored_apart(name: str, mode: str) -> None:
    """A micro-batch holds some of the groups, whole and with their rows in the order of the rollout."""
    rolled = roll_out(*made(name), mode)
    change(rolled.gate, 9)
    whole = rolled.regated()
    for wanted in ([7], [2, 7], [7, 4], [2], [2, 4]):
        rows = torch.isin(GROUPS, torch.tensor(wanted))
        record = GatingRecord(**{key: value[rows] for key, value in vars(rolled.record).items()})
        part = Rolled(
            rolled.gate,
            None,
            rolled.bag_ids[rows],
            rolled.bag_weights[rows],
            record,
            rolled.active[rows],
            rolled.thoughts,
            GROUPS[rows],
        )
        torch.testing.assert_close(part.regated(), whole[rows], atol=1e-6, rtol=0)


@MODES
def test_a_shorter_part_of_the_rollout_can_be_scored(mode: str) -> None:
    rolled = roll_out(*made("luong"), mode)
    change(rolled.gate, 9)
    whole, at = rolled.regated(), slice(3, 8)
    part = Rolled(
        rolled.gate,
        None,
        rolled.bag_ids[:, at],
        rolled.bag_weights[:, at],
        rolled.record.positions(at),
        rolled.active[:, at],
        rolled.thoughts,
        GROUPS,
    )
    torch.testing.assert_close(part.regated(), whole[:, at], atol=1e-6, rtol=0)


@MODES
def test_no_position_at_all_has_no_weights(mode: str) -> None:
    rolled = roll_out(*made("luong"), mode)
    nothing = slice(0, 0)
    part = Rolled(
        rolled.gate,
        None,
        rolled.bag_ids[:, nothing],
        rolled.bag_weights[:, nothing],
        rolled.record.positions(nothing),
        rolled.active[:, nothing],
        rolled.thoughts,
        GROUPS,
    )
    assert part.regated().shape == part.bag_weights.shape


def test_the_record_goes_through_a_batch_and_back() -> None:
    record = roll_out(*made("luong"), "m3po").record
    batch = RolloutRecord(torch.zeros(record.norm.shape), gating=record).to_batch()
    again = RolloutRecord.from_batch({**batch, "other": torch.zeros(1)})
    assert all(torch.equal(value, getattr(again.gating, key)) for key, value in vars(record).items())
    assert (record.ids.dtype, record.slots.dtype, record.probs.dtype) == (torch.int32, torch.int16, torch.float32)


@PAIRWISE
def test_the_record_of_a_rollout_gives_its_weights_back(
    name: str, projects: bool, mode: str, top_k_peers: int | None, temperature: Any
) -> None:
    """As above, with the rollout itself: phase `all`, rows that end one after the other."""
    gate, table = made(name, projects)
    table = table or torch.nn.Embedding(VOCAB, HIDDEN)
    settings = ThinkingSettings(
        mode=mode,
        cross_path_lambda=LAMBDA,
        cross_path_temp=temperature,
        cross_path_phase="all",
        thought_top_k=TOP_K,
        cross_path_top_k=top_k_peers,
        gating_type=name,
    )
    rollout = ThinkingRollout(settings, GROUPS, STEPS, VOCAB, table, None, gate)
    tokens, going = torch.zeros(len(GROUPS), 0, dtype=torch.long), torch.ones(len(GROUPS), dtype=torch.bool)
    for step, probs in enumerate(distributions()):
        tokens = torch.cat([tokens, probs.multinomial(1)], dim=1)
        after = going & (torch.arange(len(GROUPS)) != step - 1)
        with torch.no_grad():
            rollout.write(step, probs, tokens, going, after)
        going = after
    rollout.end(STEPS - 1)
    record = rollout.record
    assert record.gating is not None and record.gating.ids.shape == (len(GROUPS), STEPS - 1, TOP_K)
    mine = recompute_bag_weights(
        gate, table, record.bag_ids, record.bag_weights, record.gating, GROUPS, LAMBDA, mode == "h3po"
    )
    assert (record.bag_weights > 0).any(-1).sum() > 10
    torch.testing.assert_close(mine, record.bag_weights, atol=1e-6, rtol=0)
    assert mine.requires_grad


@pytest.mark.parametrize("lambda_blend", [0.4, 1.0])
def test_the_weights_of_a_chosen_bag_are_those_of_the_blend(lambda_blend: float) -> None:
    """Bags of other weights: what `blend_thoughts` would give the same tokens, token by token."""
    kept = top_k_tokens(distributions()[3], TOP_K, VOCAB)
    own = kept.probs / kept.norm
    rows = torch.tensor([[2, 5], [4, 4], [0, 5], [3, 3], [1, 1], [0, 2], [0, 0]])
    then = torch.tensor([[0.9, 0.1], [1.0, 0.0], [0.5, 0.5], [0.0, 0.0], [1.0, 0.0], [0.2, 0.8], [0.0, 1.0]])
    now = torch.tensor([[0.3, 0.7], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.5, 0.5], [1.0, 0.0]])
    now.requires_grad_()
    bag_ids, bag_weights = blend_thoughts(kept.ids, own, then, rows, lambda_blend)
    mine = recompute_blend_weights(bag_ids, bag_weights, kept.ids, own, now, rows, lambda_blend)
    for row in range(len(rows)):
        for token, weight, found in zip(
            bag_ids[row].tolist(), bag_weights[row].tolist(), mine[row].tolist(), strict=True
        ):
            at = [float(own[other][kept.ids[other] == token].sum()) for other in (row, *rows[row].tolist())]
            shares = [1 - lambda_blend, *(lambda_blend * now[row].detach()).tolist()]
            listens = sum(shares) > 1 - lambda_blend
            wanted = sum(a * b for a, b in zip(shares, at, strict=True)) if listens else weight
            assert abs(found - (wanted if weight > 0 else 0.0)) < 1e-6
    assert torch.equal(mine[3], bag_weights[3]), "a path without an active peer was touched"
    mine.sum().backward()
    assert torch.isfinite(now.grad).all() and (now.grad[3] == 0).all() and now.grad[0].abs().min() > 0
