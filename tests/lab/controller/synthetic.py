# SPDX-License-Identifier: Apache-2.0
"""A stand-in for a model whose best gate is known: it depends on the question alone, and nothing else matters.

A question with an "x" has its best gate at 0.2, any other at 0.8. All answers are "1". The logit of each of the
answer's three bytes is 3 - 20 (g - best)², that of other bytes 0; a gate within 0.2 of the best writes "1", any other
one "2". A test has only this where a real model's best gates are not known.
"""

from types import SimpleNamespace
from typing import Any

import torch

from m3po_lab.controller.episodes import Episodes
from m3po_lab.controller.gates import GateSpace
from m3po_lab.pretraining.data import byte_tokenizer
from m3po_lab.problems.data_sources import Problem

BEST = {"x": 0.2, "y": 0.8}
LAYERS, WIDTH = 3, 8


class Synthetic(torch.nn.Module):
    """Args: `connected`, whether the gate does anything."""

    def __init__(self, connected: bool = True) -> None:
        super().__init__()
        self.tokenizer, self.connected = byte_tokenizer(), connected
        self.embedding = torch.nn.Embedding(len(self.tokenizer), WIDTH)
        torch.nn.init.normal_(self.embedding.weight, generator=torch.Generator().manual_seed(0))
        self.config = SimpleNamespace(num_hidden_layers=LAYERS, hidden_size=WIDTH)
        self.device = torch.device("cpu")
        self.answer = self.tokenizer(" 1\n").input_ids

    def distance(self, ids: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        """(B) squared distance from the best gate, mean over the layers."""
        if not self.connected:
            return torch.zeros(len(ids))
        crossed = (ids == self.tokenizer("x").input_ids[0]).any(1)
        best = torch.where(crossed, BEST["x"], BEST["y"])
        return ((1.0 if gate is None else gate) - best[:, None, None]).expand(-1, LAYERS, -1).square().mean((1, 2))

    def forward(self, input_ids: torch.Tensor, mhc_gate: Any = None, **unused: Any) -> Any:
        logits = torch.zeros(*input_ids.shape, len(self.tokenizer))
        logits[:, :, self.answer] = (3 - 20 * self.distance(input_ids, mhc_gate))[:, None, None]
        return SimpleNamespace(logits=logits)

    def base_model(self, input_ids: torch.Tensor, **unused: Any) -> Any:
        return SimpleNamespace(last_hidden_state=self.embedding(input_ids))

    def generate(self, input_ids: torch.Tensor, mhc_gate: Any = None, **unused: Any) -> torch.Tensor:
        wrong = self.tokenizer(" 2\n").input_ids
        near = self.distance(input_ids, mhc_gate) < 0.04
        return torch.cat([input_ids, torch.tensor([self.answer if right else wrong for right in near])], 1)


def synthetic_episodes(kind: str = "global", connected: bool = True, number: int = 64) -> Episodes:
    problems = [Problem(f"{'x' if index % 2 else 'y'} {index // 2}", "1") for index in range(number)]
    model = Synthetic(connected)
    model.tokenizer.pad_token = model.tokenizer.eos_token
    return Episodes(model, model.tokenizer, problems, GateSpace(kind, LAYERS))


def best_gates(episodes: Episodes) -> list[float]:
    """Of each problem."""
    return [BEST[problem.question[0]] for problem in episodes.problems]
