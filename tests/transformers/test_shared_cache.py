# SPDX-License-Identifier: Apache-2.0
"""Attention from a cache that keeps a prompt once is that of the whole rows; whole rollouts: test_shared_prefix.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from reference.tiny import left_padded
from transformers import DynamicCache
from transformers.m3po.shared_cache import FIRST_COLUMNS, SharedCache, SharedCacheLayer
from transformers.m3po.shared_prefix import shared_prefill

PROMPTS, PATHS, HEADS, QUERIES, WIDTH = 3, 4, 2, 3, 8  # QUERIES for each head of the keys
ROWS = PROMPTS * PATHS


def expected_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """softmax(q kᵀ / √d) v for one row and one head at a time in float64: (B, 1, heads, d)."""
    rows, heads, _, width = query.shape
    out = torch.zeros(rows, 1, heads, width, dtype=torch.float64)
    for row in range(rows):
        seen = mask[row].bool()
        for head in range(heads):
            own_keys, own_values = (states[row, head // QUERIES, seen].double() for states in (keys, values))
            scores = own_keys @ query[row, head, 0].double() / math.sqrt(width)
            out[row, 0, head] = scores.softmax(0) @ own_values
    return out


@pytest.mark.parametrize("padding", [False, True], ids=["no padding", "left padding"])
@pytest.mark.parametrize(("common", "rest"), [(0, 5), (9, 5), (9, 0)])
def test_attention_is_that_of_the_whole_rows_while_the_cache_grows(common: int, rest: int, padding: bool):
    draws = torch.Generator().manual_seed(3)

    def states(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, WIDTH, generator=draws)

    prompts = DynamicCache()
    whole = [
        torch.cat([states(1, HEADS, common).expand(PROMPTS, -1, -1, -1), states(PROMPTS, HEADS, rest)], 2) for _ in "kv"
    ]
    prompts.update(*whole, 0)
    cache = SharedCache(prompts, common, PATHS)
    keys, values = (each.repeat_interleave(PATHS, 0) for each in whole)
    mask = torch.ones(ROWS, common + rest, dtype=torch.long)
    if padding:  # between what is common and the rest
        padded = torch.arange(rest) < torch.tensor([0, 2, rest - 1])[:, None]
        mask[:, common:] -= padded.long().repeat_interleave(PATHS, 0)
    for step in range(FIRST_COLUMNS + 3):
        new_keys, new_values = states(ROWS, HEADS, 1), states(ROWS, HEADS, 1)
        cache.update(new_keys, new_values, 0)
        keys, values = torch.cat([keys, new_keys], 2), torch.cat([values, new_values], 2)
        mask = torch.cat([mask, torch.ones(ROWS, 1, dtype=torch.long)], 1)
        assert cache.get_seq_length() == keys.shape[2]
        if step in (0, 1, FIRST_COLUMNS - 1, FIRST_COLUMNS, FIRST_COLUMNS + 2):
            query = states(ROWS, HEADS * QUERIES, 1)
            given = mask[:, None, None].bool() if padding else None
            out = cache.layers[0].attend(query, given, WIDTH**-0.5)
            reference = expected_attention(query, keys, values, mask)
            torch.testing.assert_close(out.double(), reference, atol=1e-5, rtol=1e-5)


def test_a_prompt_is_kept_once_and_a_step_copies_nothing():
    prompts = DynamicCache()
    prompts.update(torch.randn(PROMPTS, HEADS, 7, WIDTH), torch.randn(PROMPTS, HEADS, 7, WIDTH), 0)
    layer: Any = SharedCache(prompts, 3, PATHS).layers[0]
    assert [tuple(keys.shape[1:3]) for keys, _ in layer._prompts] == [(1, 3), (PROMPTS, 4)]
    places = set()
    for _ in range(4 * FIRST_COLUMNS):
        layer.update(torch.randn(ROWS, HEADS, 1, WIDTH), torch.randn(ROWS, HEADS, 1, WIDTH))
        places.add(layer.keys.data_ptr())
    assert len(places) == 3  # 32, 64 and 128 columns


def test_it_is_for_float32_on_a_cpu(tiny_llama: Any):
    given = left_padded([5, 3])
    rows = {name: each.repeat_interleave(2, 0) for name, each in given.items()}
    assert isinstance(shared_prefill(tiny_llama(), **rows, num_paths=2)["past_key_values"], SharedCache)
    half = shared_prefill(tiny_llama().bfloat16(), **rows, num_paths=2)["past_key_values"]
    assert type(half) is DynamicCache and half.layers[0].keys.shape[0] == 4


def test_beams_are_refused():
    layer = SharedCacheLayer([(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))], 2)
    with pytest.raises(NotImplementedError, match="beams cannot be searched from a shared prefill"):
        layer.reorder_cache(torch.zeros(2).long())


def test_attention_that_does_not_know_of_it_is_refused(tiny_llama: Any):
    model = tiny_llama()
    rows = {name: each.repeat_interleave(2, 0) for name, each in left_padded([5, 3]).items()}
    shared = shared_prefill(model, **rows, num_paths=2)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="shared_prefix needs attn_implementation='sdpa'"):
        model.generate(**rows | shared, max_new_tokens=2)
