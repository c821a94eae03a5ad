# SPDX-License-Identifier: Apache-2.0
"""What a routing gate is worth on a problem: many (problem, gate) pairs in one forward or one generation.

An episode is one problem and one gate, so that a batch of episodes is a batch of rows: `mhc_gate` takes a value for
each row. The model is frozen and decodes greedily; the same pairs have the same results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from m3po_lab.controller.gates import GateSpace
from m3po_lab.models.embedding import mean_state
from m3po_lab.problems.answers import KINDS
from m3po_lab.problems.data_sources import Problem
from m3po_lab.problems.plain_text import END, answer_text, question_text

REWARDS = ("dense", "exact", "mix")


class Episodes:
    """The problems of a split with a frozen model.

    Args:
        model: a causal language model with hyper-connections.
        tokenizer: its.
        problems: of the split.
        space: what the gates are.
        max_new_tokens: of an answer.
        rows: of a forward or generation at most.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        problems: Sequence[Problem],
        space: GateSpace,
        max_new_tokens: int = 16,
        rows: int = 256,
    ) -> None:
        self.model, self.tokenizer, self.problems, self.space = model.eval(), tokenizer, list(problems), space
        self.max_new_tokens, self.rows = max_new_tokens, rows
        first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self._questions = [first + self._ids(question_text(one)) for one in problems]
        self._answers = [self._ids(answer_text(one)) for one in problems]
        self._default: np.ndarray | None = None

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _batches(self, indices: np.ndarray) -> list[np.ndarray]:
        """Places in `indices`, of similar length together, at most `rows` of them."""
        lengths = [len(self._questions[index]) + len(self._answers[index]) for index in indices]
        return np.array_split(np.argsort(lengths, kind="stable"), -(-len(indices) // self.rows))

    def log_probs(self, indices: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Log-prob of the reference answer, mean over its tokens: one forward for `rows` pairs.

        Args:
            indices: (B,) of the problems.
            values: (B, d) in [0, 1], the gate of each.

        Returns:
            (B,) float64, nats a token.
        """
        found = np.zeros(len(indices))
        for places in self._batches(indices):
            ids, mask, lengths = self._solved(indices[places])
            longest = int(lengths.max())
            # Answers end their rows, so that the head is applied to as many positions as the longest has.
            logits = self._logits(ids, mask, values[places], logits_to_keep=longest + 1)[:, :-1]
            chosen = logits.log_softmax(-1).gather(-1, ids[:, -longest:, None]).squeeze(-1).double()
            scored = torch.arange(longest, 0, -1, device=ids.device) <= lengths[:, None]
            found[places] = ((chosen * scored).sum(1) / lengths).cpu().numpy()
        return found

    def divergences(self, indices: np.ndarray, values: np.ndarray | float) -> np.ndarray:
        """KL(gate 1 || gate) of the next token, mean over the positions of question and answer: (B,) nats.

        Args:
            indices: (B,) of the problems.
            values: (B, d) in [0, 1], or one for all.
        """
        values = np.broadcast_to(values, (len(indices), self.space.size))
        found = np.zeros(len(indices))
        for places in self._batches(indices):
            ids, mask, _ = self._solved(indices[places])
            gated = self._logits(ids, mask, values[places]).log_softmax(-1)
            full = self._logits(ids, mask, np.ones_like(values[places])).log_softmax(-1)
            kl = (full.exp() * (full - gated)).sum(-1) * mask
            found[places] = (kl.sum(1) / mask.sum(1)).double().cpu().numpy()
        return found

    def _solved(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Questions with answers, (B, L) long and padded on the left, their mask, and the answers' lengths (B)."""
        ids, mask = self._pad([self._questions[index] + self._answers[index] for index in indices], left=True)
        return ids, mask, torch.tensor([len(self._answers[index]) for index in indices], device=ids.device)

    @torch.no_grad()
    def _logits(self, ids: torch.Tensor, mask: torch.Tensor, values: np.ndarray, **options: Any) -> torch.Tensor:
        gate = self.space.as_routing_gates(values).to(ids.device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}
        return self.model(**inputs, mhc_gate=gate, **options).logits.float()

    @torch.no_grad()
    def correct(self, indices: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Whether the greedy answer is right: (B,) bool; arguments as `log_probs`."""
        found = np.zeros(len(indices), dtype=bool)
        for places in self._batches(indices):
            ids, mask = self._pad([self._questions[index] for index in indices[places]], left=True)
            gate = self.space.as_routing_gates(values[places]).to(ids.device)
            written = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                mhc_gate=gate,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
            )[:, ids.shape[1] :]
            texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
            for place, text in zip(places, texts, strict=True):
                problem = self.problems[indices[place]]
                line = text.partition(END)[0].strip()
                found[place] = KINDS[problem.kind].equal(problem.answer, line)
        return found

    def rewards(self, indices: np.ndarray, values: np.ndarray, kind: str) -> dict[str, np.ndarray]:
        """The reward of each pair and its parts, (B,) each.

        `dense` is the log-prob of the reference under the gate minus that under gate 1; `exact` is 1 for a right answer
        and 0 for a wrong one; `mix` is their sum.
        """
        if kind not in REWARDS:
            raise ValueError(f"reward={kind!r} is unknown; give one of {', '.join(REWARDS)}.")
        parts: dict[str, np.ndarray] = {}
        if kind != "exact":
            parts["dense"] = self.log_probs(indices, values) - self.default_log_probs[indices]
        if kind != "dense":
            parts["correct"] = self.correct(indices, values).astype(float)
        return {"reward": np.sum(list(parts.values()), axis=0), **parts}

    @property
    def default_log_probs(self) -> np.ndarray:
        """(n,) of every problem under gate 1, the learned default."""
        if self._default is None:
            everything = np.arange(len(self.problems))
            self._default = self.log_probs(everything, np.ones((len(everything), self.space.size)))
        return self._default

    def embeddings(self) -> np.ndarray:
        """(n, H) float32: `mean_state` of each question."""
        found = np.zeros((len(self.problems), self.model.config.hidden_size), dtype=np.float32)
        for places in self._batches(np.arange(len(self.problems))):
            ids, mask = self._pad([self._questions[index] for index in places], left=False)
            found[places] = mean_state(self.model, ids, mask)
        return found

    def inputs(self, number: int) -> dict[str, torch.Tensor]:
        """The first problems with their answers, as a forward takes them."""
        ids, mask, _ = self._solved(np.arange(min(number, len(self.problems))))
        return {"input_ids": ids, "attention_mask": mask}

    def _pad(self, rows: Sequence[list[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows as (B, L) long with their mask."""
        length, pad = max(map(len, rows)), self.tokenizer.pad_token_id
        ids, mask = [], []
        for row in rows:
            fill = length - len(row)
            before, behind = (fill, 0) if left else (0, fill)
            ids.append([pad] * before + row + [pad] * behind)
            mask.append([0] * before + [1] * len(row) + [0] * behind)
        device = self.model.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
