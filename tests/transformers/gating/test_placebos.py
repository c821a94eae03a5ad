# SPDX-License-Identifier: Apache-2.0
"""The gating functions that know nothing: each is what it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from reference.gates import distributions
from reference.tiny import LIVELY, alive_after, left_padded, small_tokenizer
from transformers.m3po import M3POGenerationState
from transformers.m3po.gating import create_gating_function, list_gating_functions, list_placebos
from transformers.m3po.thinking.bags import Peers, exchange_groups
from transformers.m3po.thinking.interaction import PathGroups

EOS, GROUPS, PATHS, LAMBDA = [2, 60, 61, 62], 3, 4, 0.3


def test_they_are_gating_functions_by_name_and_not_among_those_that_look() -> None:
    assert list_placebos() == ["random", "shuffled", "uniform"]
    assert not set(list_placebos()) & set(list_gating_functions())
    with pytest.raises(ValueError, match="bahdanau, baseline, .*, random, shuffled, uniform"):
        create_gating_function("placebo")


@pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
def test_uniform_hears_every_active_peer_alike(temperature: float) -> None:
    gate = create_gating_function("uniform", {"temperature": temperature})
    active = torch.tensor([[True, True, False, True, True], [True, False, False, False, True]])
    weights = gate.compute_attention_weights(gate(distributions("peaked", 5)), active)
    both = (active[:, :, None] & active[:, None, :]) & ~torch.eye(5, dtype=torch.bool)
    torch.testing.assert_close(weights, both / both.sum(-1, keepdim=True).clamp_min(1))


def test_random_weights_are_uniform_on_the_simplex_and_know_nothing_of_the_paths() -> None:
    torch.manual_seed(0)
    gate, peers, number = create_gating_function("random"), 4, 4000
    probs = distributions("peaked", peers + 1)[:1].expand(number, -1, -1)  # the same group again and again
    weights = gate.compute_attention_weights(gate(probs), torch.ones(number, peers + 1, dtype=torch.bool))
    drawn = weights[:, 0, 1:].double()
    variance = (peers - 1) / (peers**2 * (peers + 1))  # of Dirichlet(1, ..., 1)
    np.testing.assert_allclose(drawn.mean(0), 1 / peers, atol=4 * (variance / number) ** 0.5)
    np.testing.assert_allclose(drawn.var(0), variance, rtol=0.1)
    assert torch.isfinite(gate(probs)).all()


def rollout(model: Any, gate: str, **overrides: Any) -> Any:
    torch.manual_seed(2)
    arguments = {
        **left_padded([4, 9, 7]),
        "tokenizer": small_tokenizer(),
        "do_sample": True,
        "top_k": 0,
        "num_return_sequences": PATHS,
        "max_new_tokens": 14,
        "eos_token_id": EOS,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        "output_scores": True,
        "enable_cross_path": True,
        "cross_path_lambda": LAMBDA,
        "gating_type": gate,
    }
    return model.generate(**arguments | overrides)


def test_shuffled_gives_the_weights_of_the_baseline_to_the_next_group(tiny_llama: Any) -> None:
    """Step by step from the scores, by loops: whom a path of the baseline would hear, in the next group."""
    output = rollout(tiny_llama(**LIVELY), "shuffled", max_new_tokens=40)
    tokens = output.sequences[:, -output.rollout_logps.shape[1] :]
    active = output.thinking_mask & alive_after(tokens, EOS)
    baseline = create_gating_function("baseline")
    changed = alone = 0
    for step, scores in enumerate(output.scores):
        probs = scores.softmax(-1).view(GROUPS, PATHS, -1)
        own = active[:, step].view(GROUPS, PATHS)
        weights = baseline.compute_attention_weights(baseline(probs), own)
        for group in range(GROUPS):
            other = (group + 1) % GROUPS
            for path in range(PATHS):
                row = group * PATHS + path
                expected = {slot: float(weights[group, path, slot]) for slot in range(PATHS) if own[other, slot]}
                expected = {slot: weight for slot, weight in expected.items() if weight > 0}
                total = sum(expected.values())
                bag = dict.fromkeys(output.bag_ids[row, step].tolist(), 0.0)
                for token, weight in zip(
                    output.bag_ids[row, step].tolist(), output.bag_weights[row, step], strict=True
                ):
                    bag[token] += float(weight)
                if not expected:
                    assert not output.bag_weights[row, step].any()
                    alone += bool(own[group, path])
                    continue
                wanted = {int(tokens[row, step]): 1 - LAMBDA}
                for slot, weight in expected.items():
                    token = int(tokens[other * PATHS + slot, step])
                    wanted[token] = wanted.get(token, 0.0) + LAMBDA * weight / total
                assert {k: v for k, v in bag.items() if v > 0}.keys() == wanted.keys()
                for token, weight in wanted.items():
                    assert bag[token] == pytest.approx(weight, abs=1e-4)
                changed += total < 0.999
    assert changed and alone, "no group had lost a path"


def test_an_uneven_group_is_heard_where_it_has_a_path_and_top_k_is_kept() -> None:
    groups = PathGroups(torch.tensor([0, 0, 0, 1, 1]))
    slots = groups.ring[:, 1:]
    peers = Peers(torch.full((5, 2), 0.5), groups.peers[:, 1:], slots, torch.zeros(5))
    active = torch.tensor([True, True, True, True, False])
    shuffled = exchange_groups(peers, groups, active)
    for row in range(3):  # group 1 has slot 0 alone, its second path is inactive
        heard = [(int(r), float(w)) for r, w in zip(shuffled.rows[row], shuffled.weights[row], strict=True) if w > 0]
        assert heard == ([(3, 1.0)] if 0 in slots[row].tolist() else [])


def test_shuffled_needs_another_group(tiny_llama: Any) -> None:
    one = {name: rows[:1] for name, rows in left_padded([9, 4, 7]).items()}
    with pytest.raises(
        ValueError, match="gating_type='shuffled' hears the paths of another group.*two prompts or more"
    ):
        rollout(tiny_llama(), "shuffled", **one)
    assert rollout(tiny_llama(), "shuffled", **one, cross_path_lambda=0.0).bag_ids is None  # nothing to hear


@pytest.mark.parametrize("gate", ["uniform", "random", "shuffled"])
def test_matched_to_the_baseline_each_still_rolls_out(tiny_llama: Any, gate: str) -> None:
    state = M3POGenerationState()
    output = rollout(tiny_llama(**LIVELY), gate, cross_path_temp="match", m3po=state)
    assert output.rollout_logps.isfinite().all() and (output.bag_weights[..., 1:] > 0).any()
    assert all(value.isfinite() for value in state.statistics.values())
