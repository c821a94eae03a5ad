# SPDX-License-Identifier: Apache-2.0
"""Tokens drawn by inverting the distribution function: the same distribution as torch.multinomial's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference.tiny import LIVELY, left_padded
from scipy.stats import chisquare
from transformers.m3po import M3POGenerationState
from transformers.m3po.generation.sampling import BLOCK, invert_cdf


def test_the_shares_of_the_tokens_are_their_probabilities():
    probs = torch.tensor([[0.5, 0.0, 0.2, 0.25, 0.05, 0.0]])
    drawn = invert_cdf(probs.expand(40_000, -1)).flatten().bincount(minlength=6)
    assert drawn[1] == drawn[5] == 0
    some = probs[0] > 0
    assert chisquare(drawn[some].numpy(), (probs[0][some].double() * 40_000).numpy()).pvalue > 1e-3


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (0.4999, 1), (0.5, 3), (1.0 - 2.0**-53, 3)])
def test_both_ends_of_the_random_numbers_give_a_token_that_can_be(
    monkeypatch: pytest.MonkeyPatch, uniform: float, token: int
):
    monkeypatch.setattr(torch, "rand", lambda *size, **more: torch.full(size[0], uniform, dtype=torch.float64))
    assert invert_cdf(torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])).tolist() == [[token]]
    assert invert_cdf(torch.tensor([[0.0, 0.7, 0.0, 0.7, 0.0]])).tolist() == [[token]]  # of any sum


def test_every_token_of_a_vocabulary_of_several_blocks_can_be_drawn():
    for size in (BLOCK, BLOCK + 1, 3 * BLOCK - 1):
        weights = torch.arange(1, size + 1).float()
        drawn = invert_cdf(weights.expand(60_000, -1)).flatten().bincount(minlength=size)
        assert len(drawn) == size
        assert chisquare(drawn.numpy(), (weights.double() / weights.double().sum() * 60_000).numpy()).pvalue > 1e-3


def test_a_row_without_finite_probabilities_gives_some_token_of_the_vocabulary():
    assert 0 <= int(invert_cdf(torch.full((1, 300), torch.nan))) < 300


def test_a_token_of_small_probability_in_a_large_vocabulary_is_drawn_as_often_as_it_should():
    probs = torch.full((1, 200_000), 1e-6)
    probs[0, 0] = 0.8
    drawn = invert_cdf(probs.expand(2_000, -1)).flatten()
    assert abs((drawn > 0).float().mean() - 0.2) < 0.03
    assert abs((drawn > 100_000).float().mean() - 0.1) < 0.025


def test_a_rollout_of_a_state_draws_so_only_when_it_is_told_to(tiny_llama: Any):
    model = tiny_llama(**LIVELY)

    def tokens(**given: Any) -> torch.Tensor:
        torch.manual_seed(0)
        return model.generate(**left_padded([5, 3]), max_new_tokens=6, do_sample=True, **given)

    upstream = tokens()
    assert torch.equal(tokens(m3po=M3POGenerationState()), upstream)
    assert not torch.equal(tokens(m3po=M3POGenerationState(inverse_cdf=True)), upstream)


def test_its_log_probs_are_those_of_the_distribution_it_drew_from(tiny_llama: Any):
    model, state = tiny_llama(**LIVELY), M3POGenerationState(inverse_cdf=True)
    prompts = left_padded([5, 3])
    options = {"max_new_tokens": 6, "do_sample": True, "top_k": 0, "output_scores": True}
    result = model.generate(**prompts, m3po=state, return_dict_in_generate=True, **options)
    logps = torch.stack(result.scores, 1).log_softmax(-1).gather(-1, result.sequences[:, 5:, None]).squeeze(-1)
    torch.testing.assert_close(state.rollout_logps, logps)
