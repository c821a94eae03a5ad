# SPDX-License-Identifier: Apache-2.0
"""Keys and values of a rollout on a CPU: what rows have in common is kept once, what is new is written in place.

Upstream's dynamic cache holds B rows of L + t columns and copies all of them in every decode step. Here a layer holds
parts of rising number of rows,

    common beginning (1, ...) | rests of the prompts (G, ...) | completions (B, ...),

of which the last alone grows, by doubling. In a decode step all rows that share a row of a part are the queries of one
matrix product with it, so that a prompt's keys and values are read once for its N paths (Hydragen, arXiv 2402.05099,
has it for one level). It is the attention of the whole rows; sums are made in another order.
"""

from __future__ import annotations

import functools

import torch

from ..cache_utils import Cache, CacheLayerMixin, DynamicCache

FIRST_COLUMNS = 32  # of the completions, before they double


class SharedCacheLayer(CacheLayerMixin):
    """The cache of one layer.

    Args:
        prompts: keys and values (R, heads, columns, d) of what is shared, where R divides B; columns may be 0.
        num_rows: B.
    """

    def __init__(self, prompts: list[tuple[torch.Tensor, torch.Tensor]], num_rows: int):
        super().__init__()
        self._prompts = [pair for pair in prompts if pair[0].shape[2]]
        self._prompt_length = sum(keys.shape[2] for keys, _ in self._prompts)
        self._length = 0
        first = prompts[0][0]
        self.lazy_initialization(*first.new_empty(2, num_rows, first.shape[1], FIRST_COLUMNS, first.shape[3]))

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Takes tensors (B, heads, columns, d) as room for the completions."""
        self.keys, self.values = key_states, value_states
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the keys and values (B, heads, c, d) of new columns; returns those of the completions alone."""
        end = self._length + key_states.shape[2]
        while end > self.keys.shape[2]:
            self.keys, self.values = (torch.cat([old, torch.empty_like(old)], 2) for old in (self.keys, self.values))
        self.keys[:, :, self._length : end] = key_states
        self.values[:, :, self._length : end] = value_states
        self._length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def attend(self, query: torch.Tensor, attention_mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
        """The attention of the last column.

        Args:
            query: (B, heads, 1, d); keys have as many heads or fewer.
            attention_mask: (B, 1, 1, L + t) bool, or None where all is attended to.
            scaling: of the scores.

        Returns:
            (B, 1, heads, d).
        """
        rows, heads, _, width = query.shape
        query = (query * scaling).reshape(rows, self.keys.shape[1], -1, width)  # (B, heads of keys, queries of each, d)
        completions = self.keys[:, :, : self._length], self.values[:, :, : self._length]
        parts = [*self._prompts, completions]
        scores = torch.cat([_by_part(query, keys.transpose(2, 3)) for keys, _ in parts], -1)
        if attention_mask is not None:
            scores.masked_fill_(~attention_mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1).split([keys.shape[2] for keys, _ in parts], -1)
        outputs = [_by_part(part, values) for part, (_, values) in zip(weights, parts, strict=True)]
        return functools.reduce(torch.add, outputs).reshape(rows, 1, heads, width)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self._prompt_length + self._length

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Rows share what they hold.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "beams cannot be searched from a shared prefill: rows that share a prompt stay where they are."
        )


class SharedCache(Cache):
    """The cache of a rollout; made of that of the prompts.

    Args:
        prompts: of R rows, which all begin with the same columns.
        common_length: K, how many; may be 0.
        num_paths: N, rows of the rollout for each row of `prompts`.
    """

    def __init__(self, prompts: DynamicCache, common_length: int, num_paths: int):
        layers = []
        for layer in prompts.layers:
            pair = layer.keys, layer.values
            common = [states[:1, :, :common_length].contiguous() for states in pair]
            rests = [states[:, :, common_length:].contiguous() for states in pair]
            layers.append(SharedCacheLayer([tuple(common), tuple(rests)], len(layer.keys) * num_paths))
        super().__init__(layers=layers)

    @staticmethod
    def serves(prompts: DynamicCache) -> bool:
        """Whether it serves: on a CPU, and not in half precision, in which scores would be rounded before softmax."""
        keys = prompts.layers[0].keys
        return keys.device.type == "cpu" and keys.dtype in (torch.float32, torch.float64)


def _by_part(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left (B, heads, q, a) times right (R, heads, a, b), each row with its own of the R: (B, heads, q, b)."""
    rows, heads, queries, _ = left.shape
    if len(right) == rows:
        return left @ right
    grouped = left.unflatten(0, (len(right), -1)).transpose(1, 2).flatten(2, 3)  # (R, heads, B / R q, a)
    product = grouped @ right
    return product.unflatten(2, (-1, queries)).transpose(1, 2).flatten(0, 1)
