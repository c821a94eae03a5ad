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
    """The cache of one layer. Inside the heads come first, so that rows that share a row of a part lie side by side.

    Args:
        prompts: keys and values (R, heads, columns, d) of what is shared, where R divides B; columns may be 0.
        num_rows: B.
    """

    def __init__(self, prompts: list[tuple[torch.Tensor, torch.Tensor]], num_rows: int):
        super().__init__()
        shared = [(keys.transpose(0, 1), values.transpose(0, 1)) for keys, values in prompts if keys.shape[2]]
        self._prompts = [(keys.contiguous(), values.contiguous()) for keys, values in shared]
        self._prompt_length = sum(keys.shape[2] for keys, _ in self._prompts)
        self._length = 0
        first = prompts[0][0]
        self.lazy_initialization(*first.new_empty(2, first.shape[1], num_rows, FIRST_COLUMNS, first.shape[3]))

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Takes tensors (heads, B, columns, d) as room for the completions."""
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
        self.keys[:, :, self._length : end] = key_states.transpose(0, 1)
        self.values[:, :, self._length : end] = value_states.transpose(0, 1)
        self._length = end
        return self.keys[:, :, :end].transpose(0, 1), self.values[:, :, :end].transpose(0, 1)

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
        query = (query * scaling).reshape(rows, len(self.keys), -1, width).transpose(0, 1).contiguous()
        parts = [*self._prompts, (self.keys[:, :, : self._length], self.values[:, :, : self._length])]
        scores = torch.cat([_by_part(query, keys.transpose(2, 3)) for keys, _ in parts], -1)
        if attention_mask is not None:
            scores.masked_fill_(~attention_mask.transpose(0, 1), torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1).split([keys.shape[2] for keys, _ in parts], -1)
        outputs = [_by_part(part, values) for part, (_, values) in zip(weights, parts, strict=True)]
        return functools.reduce(torch.add, outputs).transpose(0, 1).reshape(rows, 1, heads, width)

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
            common = tuple(states[:1, :, :common_length] for states in pair)
            rests = tuple(states[:, :, common_length:] for states in pair)
            layers.append(SharedCacheLayer([common, rests], len(layer.keys) * num_paths))
        super().__init__(layers=layers)

    @staticmethod
    def serves(prompts: DynamicCache) -> bool:
        """Whether it serves: on a CPU, and not in half precision, in which scores would be rounded before softmax."""
        keys = prompts.layers[0].keys
        return keys.device.type == "cpu" and keys.dtype in (torch.float32, torch.float64)


def _by_part(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left (heads, B, q, a) times right (heads, R, a, b), each row with its own of the R: (heads, B, q, b)."""
    heads, rows, queries, inner = left.shape
    return (left.view(heads, right.shape[1], -1, inner) @ right).view(heads, rows, queries, -1)
