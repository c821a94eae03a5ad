# SPDX-License-Identifier: Apache-2.0
"""Finds the answer marker in the completions while they are sampled, without decoding text.

Upstream's `StopStringCriteria` matches a string on token ids, on the device, across token boundaries and with overhang
on both ends. It answers for the last token of a row only; here it sees the completion alone (a prompt may contain the
marker) and its answer is latched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

from ...generation.stopping_criteria import StopStringCriteria

if TYPE_CHECKING:
    from ...tokenization_utils_base import PreTrainedTokenizerBase

# Building a criterion reads the whole vocabulary, which is too slow to do at every rollout.
_CRITERIA: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[str, int], StopStringCriteria]] = WeakKeyDictionary()


class _MarkerCriteria(StopStringCriteria):
    """Upstream's criterion, for byte-level vocabularies that were read from GGUF too.

    Those get a decoder that names `ByteFallback` as well, and upstream believes that one: tokens that hold a part of a
    character would never match. The vocabulary tells: fallback tokens are written `<0x..>`.
    """

    @staticmethod
    def _get_stop_string_matching_mode(tokenizer: PreTrainedTokenizerBase) -> str | None:
        mode = StopStringCriteria._get_stop_string_matching_mode(tokenizer)
        return "byte_level" if mode == "byte_fallback" and "<0x41>" not in tokenizer.get_vocab() else mode


def _criterion(tokenizer: PreTrainedTokenizerBase, marker: str) -> StopStringCriteria:
    known = _CRITERIA.setdefault(tokenizer, {})
    key = (marker, len(tokenizer))
    if key not in known:
        known[key] = _MarkerCriteria(tokenizer, [marker])
    return known[key]


class AnswerMarker:
    """Latched per row: has the completion so far contained the marker?

    Args:
        tokenizer: the tokenizer of the model.
        marker: the text, e.g. `####`.
        num_rows, device: B and where the rows live.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, marker: str, num_rows: int, device: torch.device):
        self._criterion = _criterion(tokenizer, marker)
        self.found = torch.zeros(num_rows, dtype=torch.bool, device=device)

    def update(self, completion_ids: torch.Tensor) -> torch.Tensor:
        """Takes the completions (B, t) after each new token, t >= 1; returns the latch (B,) bool."""
        self.found = self.found | self._criterion(completion_ids, None)
        return self.found
