# SPDX-License-Identifier: Apache-2.0
"""Noise that a scoring pass repeats exactly: a function of where it stands, not of when it is drawn.

A generator with a state would have to be brought to the same state in the rollout, the policy pass and every other
pass. Here each number is a hash of (row seed, token index, round, latent path, hidden unit), in whole numbers below
2^32, so that decode step by step, a full forward, another batch and another process see the same noise:

    mix(x):  x ^= x >> 16;  x *= 0x21F0AAAD;  x ^= x >> 15;  x *= 0x735A2D97;  x ^= x >> 15        (mod 2^32)
    next(k, v) = mix((k ^ v) + 0x9E3779B9)
    k = next(next(next(0, row seed), token index), round * 2^16 + path);   x = next(k, next(0, unit))
    u = (floor(x / 2^9) + 1/2) / 2^23;   g = -log(-log(u));   noise = (g - 0.5772...) * sqrt(6) / pi

`mix` is a bijection with good avalanche (constants of the hash-prospector project); both factors are below 2^31, so
that no product overflows int64. The last line makes standard Gumbel numbers zero-mean and of variance one.
"""

from __future__ import annotations

import math

import torch

MASK = 0xFFFFFFFF
INCREMENT = 0x9E3779B9
EULER_GAMMA = 0.5772156649015329


@torch.no_grad()
def latent_noise(
    row_seeds: torch.Tensor, token_index: torch.Tensor, num_paths: int, round_index: int, hidden_size: int
) -> torch.Tensor:
    """Gumbel noise of mean 0 and variance 1.

    Args:
        row_seeds: (B,) integers, taken modulo 2^32.
        token_index: (B, L) or (1, L) integers, the tokens' own indices without padding.
        num_paths: P, below 2^16.
        round_index: the round that the noise is for, from 0.
        hidden_size: H.

    Returns:
        (B, L, P, H) float32. Cost: some twelve operations on whole numbers and two logarithms for each.
    """
    device = row_seeds.device
    codes = torch.arange(num_paths, device=device) + (round_index << 16)
    units = _next(torch.zeros((), dtype=torch.long, device=device), torch.arange(hidden_size, device=device))
    key = _next(torch.zeros_like(row_seeds, dtype=torch.long), row_seeds.long())
    key = _next(key.unsqueeze(-1), token_index.long())
    key = _next(key.unsqueeze(-1), codes)
    bits = _next(key.unsqueeze(-1), units)
    uniform = (bits.bitwise_right_shift_(9).float() + 0.5) * 2.0**-23
    return (uniform.log_().neg_().log_().neg_() - EULER_GAMMA) * (math.sqrt(6.0) / math.pi)


def _next(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """One link of the chain, broadcast: int64 tensors of numbers below 2^32."""
    mixed = ((key ^ value) + INCREMENT) & MASK  # a new tensor; the rest is done in place
    mixed ^= mixed >> 16
    mixed *= 0x21F0AAAD
    mixed &= MASK
    mixed ^= mixed >> 15
    mixed *= 0x735A2D97
    mixed &= MASK
    mixed ^= mixed >> 15
    return mixed
