# SPDX-License-Identifier: Apache-2.0
"""ASLR, slowly, in float64: one row, position, latent path and head at a time, the noise in Python's integers.

Written from the equations (as `m3po/aslr/modules.py` and `m3po/aslr/noise.py` state them) and from
nothing else, to have something to hold the vectorised code against. Two readings of theirs: the spread of the latent
paths is the root of the mean over units of their variance over paths; a state of zeros, whose z is 0 / 0, has z = 0.

Nothing here needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

HEADS = 8
NOISE = 0.1  # σ at aslr_gumbel_temp=1
SLOPE = 10.0
GAMMA = 0.57721566490153286061

Array = np.ndarray[Any, np.dtype[np.float64]]


class Modules(NamedTuple):
    """The parameters, each applied as `W x + b`: router, collaborator (queries, then keys, then values), a, W, c."""

    router_w: Array  # (1, H)
    router_b: Array  # (1,)
    in_w: Array  # (3H, H)
    in_b: Array  # (3H,)
    out_w: Array  # (H, H)
    out_b: Array  # (H,)
    share: Array  # (P,)
    proj_w: Array  # (H, H)
    proj_b: Array  # (H,)


class Numbers(NamedTuple):
    """The hyperparameters of ASLR with their defaults."""

    num_paths: int = 4
    max_iterations: int = 2
    threshold: float = 0.5
    gumbel_temp: float = 1.0
    cross_path_lambda: float = 0.1
    cross_path_temp: float = 0.1


class Refined(NamedTuple):
    """States (B, L, H); score, spread after expansion and after the last round, each (B, L), NaN on padding."""

    states: Array
    score: Array
    before: Array
    after: Array


def mix(x: int) -> int:
    """A bijection of the whole numbers below 2^32."""
    x ^= x >> 16
    x = x * 0x21F0AAAD % 2**32
    x ^= x >> 15
    x = x * 0x735A2D97 % 2**32
    return x ^ x >> 15


def follow(key: int, value: int) -> int:
    """One link of the chain of keys."""
    return mix(((key ^ value) + 0x9E3779B9) % 2**32)


@cache
def unit_code(unit: int) -> int:
    """What a hidden unit adds to the chain."""
    return follow(0, unit)


def uniform(seed: int, token: int, round_index: int, path: int, unit: int) -> float:
    """One number in (0, 1), an odd multiple of 2^-24."""
    key = follow(follow(0, seed % 2**32), token)
    key = follow(key, round_index * 2**16 + path)
    return (follow(key, unit_code(unit)) // 2**9 + 0.5) / 2**23


def noise(seed: int, token: int, round_index: int, path: int, unit: int) -> float:
    """One Gumbel number, made zero-mean and of variance one."""
    gumbel = -math.log(-math.log(uniform(seed, token, round_index, path, unit)))
    return (gumbel - GAMMA) * math.sqrt(6) / math.pi


def noise_vector(seed: int, token: int, round_index: int, path: int, size: int) -> Array:
    """The noise (H,) of one latent path in one round."""
    return np.array([noise(seed, token, round_index, path, unit) for unit in range(size)])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else 1 - 1 / (1 + math.exp(x))


def softmax(logits: Sequence[float]) -> list[float]:
    most = max(logits)
    powers = [math.exp(x - most) for x in logits]
    return [power / sum(powers) for power in powers]


def collaborate(paths: list[Array], modules: Modules, temperature: float) -> list[Array]:
    """What each latent path (H,) hears: attention of eight heads over all paths, its own among them."""
    size = len(paths[0])
    width = size // HEADS
    projected = [modules.in_w @ path + modules.in_b for path in paths]
    heard = []
    for own in projected:
        parts = []
        for head in range(HEADS):
            q, k, v = (slice(i * size + head * width, i * size + (head + 1) * width) for i in range(3))
            logits = [float(own[q] @ other[k]) / math.sqrt(width) / temperature for other in projected]
            parts.append(sum(w * other[v] for w, other in zip(softmax(logits), projected, strict=True)))
        heard.append(modules.out_w @ np.concatenate(parts) + modules.out_b)
    return heard


def spread(paths: list[Array]) -> float:
    """RMS over units of the standard deviation over latent paths."""
    mean = sum(paths) / len(paths)
    return math.sqrt(sum(float((path - mean) @ (path - mean)) for path in paths) / len(paths) / len(mean))


def refine_one(
    state: Array, seed: int, token: int, modules: Modules, numbers: Numbers
) -> tuple[Array, float, float, float]:
    """The refined state (H,) of one position, its router score and the two spreads."""
    size, strength = len(state), NOISE * numbers.gumbel_temp

    def with_noise(path: Array, p: int, round_index: int) -> Array:
        return path + strength * noise_vector(seed, token, round_index, p, size) if strength else path

    rms = math.sqrt(float(state @ state) / size)
    z = state / rms if rms else state
    score = sigmoid(float(modules.router_w[0] @ state + modules.router_b[0]))
    paths = [with_noise(z, p, 0) for p in range(numbers.num_paths)]
    before = spread(paths)
    for r in range(numbers.max_iterations):
        said = paths if r == 0 else [with_noise(path, p, r) for p, path in enumerate(paths)]
        heard = collaborate(said, modules, numbers.cross_path_temp)
        share = numbers.cross_path_lambda
        paths = [(1 - share) * own + share * other for own, other in zip(paths, heard, strict=True)]
    joined = sum(w * path for w, path in zip(softmax(list(modules.share)), paths, strict=True))
    let_in = sigmoid(SLOPE * (score - numbers.threshold))
    refined = state + let_in * rms * (modules.proj_w @ joined + modules.proj_b)
    return refined, score, before, spread(paths)


def refine(
    states: Array,
    seeds: Sequence[int],
    tokens: Sequence[Sequence[int | None]],
    modules: Modules,
    numbers: Numbers,
) -> Refined:
    """The states (B, L, H) refined; tokens[row][position] is the token's index without padding, None on padding."""
    result = Refined(np.array(states, dtype=np.float64), *(np.full(states.shape[:2], np.nan) for _ in range(3)))
    for row, indices in enumerate(tokens):
        for position, token in enumerate(indices):
            if token is None or numbers.num_paths == 1 or numbers.max_iterations == 0:
                continue
            state = np.array(states[row, position], dtype=np.float64)
            values = refine_one(state, seeds[row], token, modules, numbers)
            for place, value in zip(result, values, strict=True):
                place[row, position] = value
    return result
