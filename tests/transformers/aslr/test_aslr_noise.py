# SPDX-License-Identifier: Apache-2.0
"""The noise of ASLR: its known answers, its distribution, and that a number depends on its place alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from reference import aslr
from transformers.m3po.aslr.noise import latent_noise

pytestmark = pytest.mark.usefixtures("one_thread")


# (row seed, token, round, path, unit): the 24-bit numerator of u and the noise, of the reference as first written.
KNOWN = {
    (0, 0, 0, 0, 0): (5187449, -0.5749833031298892),
    (1, 0, 0, 0, 0): (11596917, 0.3266755812906988),
    (0, 1, 0, 0, 0): (9716789, 0.021531816343990276),
    (0, 0, 1, 0, 0): (12445983, 0.4922653506848005),
    (0, 0, 0, 1, 0): (15725341, 1.6841703180819039),
    (0, 0, 0, 0, 1): (11908697, 0.3848038564608638),
    (12345, 17, 2, 3, 31): (5885549, -0.48625229803962516),
    (2**31 - 1, 511, 1, 0, 5): (10906935, 0.2068588109079194),
}


@pytest.mark.parametrize("where", list(KNOWN))
def test_the_noise_has_its_known_answers(where):
    seed, token, round_index, path, unit = where
    numerator, value = KNOWN[where]
    assert aslr.uniform(*where) * 2**24 == numerator and aslr.noise(*where) == pytest.approx(value, abs=1e-14)
    mine = latent_noise(torch.tensor([seed]), torch.tensor([[token]]), path + 1, round_index, unit + 1)
    assert mine[0, 0, path, unit].item() == pytest.approx(value, abs=2e-6)


def test_the_noise_is_that_of_the_reference():
    """Each token of a row its own index; also seeds and tokens of other sizes and types than those of a rollout."""
    seeds = [5, 2**31 - 1, 2**32 - 1]
    tokens = torch.tensor([[0, 0, 1, 2], [7, 8, 131071, 10], [1, 0, 3, 2**31 - 1]])
    for round_index in (0, 3):
        mine = latent_noise(torch.tensor(seeds), tokens, 3, round_index, 9)
        assert mine.dtype == torch.float32 and mine.shape == (3, 4, 3, 9)
        expected = [
            [[aslr.noise_vector(seed, token, round_index, path, 9) for path in range(3)] for token in row]
            for seed, row in zip(seeds, tokens.tolist(), strict=True)
        ]
        torch.testing.assert_close(mine.double(), torch.tensor(np.array(expected)), atol=2e-6, rtol=2e-6)
    other = latent_noise(torch.tensor([5, 2**32 + 5, 5 - 2**32]), tokens[:1].int(), 3, 3, 9)
    assert torch.equal(
        other, latent_noise(torch.tensor([5], dtype=torch.int32), tokens[:1], 3, 3, 9).expand(3, -1, -1, -1)
    )


def test_a_million_numbers_are_finite_gumbel_numbers_of_mean_zero_and_variance_one():
    noise = latent_noise(torch.arange(8), torch.arange(128)[None], 8, 1, 128).double().flatten()
    assert noise.numel() == 2**20 and noise.isfinite().all()
    # Four standard errors; the fourth moment of a Gumbel number of variance one is 5.4.
    assert abs(noise.mean()) < 4e-3 and abs(noise.var() - 1) < 4 * 2.1e-3
    gumbel = noise.sort().values * math.pi / math.sqrt(6) + aslr.GAMMA
    ranks = (torch.arange(2**20, dtype=torch.float64) + 0.5) / 2**20
    # Kolmogorov and Smirnov: in 999 of 1,000 cases the distance stays below 1.95 / sqrt(n).
    assert ((-(-gumbel).exp()).exp() - ranks).abs().max() < 1.95 / 2**10


@pytest.mark.parametrize("axis", ["seed", "token", "round", "path", "unit"])
def test_the_noise_is_independent_along_every_axis(axis):
    """Neighbours, and numbers 2 and 16 apart: for a hash of small whole numbers these are the hardest."""
    rounds = torch.stack([latent_noise(torch.arange(17), torch.arange(20)[None], 17, r, 20) for r in range(17)])
    numbers = rounds.movedim({"round": 0, "seed": 1, "token": 2, "path": 3, "unit": 4}[axis], 0).flatten(1)
    for apart in (1, 2, 16):
        one, other = numbers[:-apart].flatten(), numbers[apart:].flatten()
        both = torch.stack([one, other])
        size = one.numel()
        assert size > 10**5
        # The numbers, their squares and their signs, up to 4.5 standard errors (45 correlations are looked at).
        for change in (torch.clone, torch.square, torch.sign):
            assert abs(torch.corrcoef(change(both))[0, 1]) < 4.5 / size**0.5, (apart, change)


def test_no_two_places_share_their_noise():
    """Not even those that a sum or an exclusive or of the coordinates would mix up."""
    rounds = [latent_noise(torch.arange(12), torch.arange(12)[None], 12, r, 12).flatten() for r in range(12)]
    numbers = torch.cat(rounds)
    # 2^23 values, 12^5 = 248,832 numbers: by chance 245,178 of them differ, give or take 60.
    assert abs(numbers.unique().numel() - 245178) < 400
    vectors = torch.cat([r.view(-1, 12) for r in rounds])
    assert vectors.unique(dim=0).shape == vectors.shape


def test_the_noise_of_a_token_does_not_depend_on_what_else_is_computed():
    seeds, tokens = torch.tensor([5, 9, 1]), torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7], [0, 0, 0, 1]])
    whole = latent_noise(seeds, tokens, 4, 1, 16)
    assert torch.equal(latent_noise(seeds[[2, 0]], tokens[[2, 0]], 4, 1, 16), whole[[2, 0]])
    assert torch.equal(latent_noise(seeds, tokens[:, 2:3], 4, 1, 16), whole[:, 2:3])
    assert torch.equal(latent_noise(seeds, tokens, 2, 1, 8), whole[:, :, :2, :8])
    assert torch.equal(latent_noise(seeds[1:2], tokens[1:2].flip(1), 4, 1, 16), whole[1:2].flip(1))
    one_for_all = latent_noise(seeds, tokens[:1], 4, 1, 16)
    assert torch.equal(one_for_all, latent_noise(seeds, tokens[:1].expand(3, -1), 4, 1, 16))


def test_the_noise_leaves_torchs_generator_and_its_arguments_be():
    seeds, tokens, state = torch.tensor([5, 9]), torch.tensor([[0, 1], [2, 3]]), torch.get_rng_state()
    noise = latent_noise(seeds, tokens, 4, 1, 16)
    assert torch.equal(torch.get_rng_state(), state) and not noise.requires_grad
    assert seeds.tolist() == [5, 9] and tokens.tolist() == [[0, 1], [2, 3]]
