# SPDX-License-Identifier: Apache-2.0
"""What a rollout did, from `_sample` through the trainer's batch to the forward of a scoring pass.

The decode loop allocates a `RolloutRecord` for the longest completion and writes one position a step. The trainer cuts
or pads it to its batch, carries it there as tensors of B rows (`to_batch`, `from_batch`), and hands a pass the rows
that it scores (`rows`, `forward_kwargs`). No other module knows the names of these tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from .thoughts import TopKTokens

PREFIX = "rollout_"  # of the record's tensors in a batch
GATING_PREFIX = f"{PREFIX}gating_"
BAG_ARGUMENTS = ("thinking_bag_ids", "thinking_bag_weights")  # of a forward, see `mix_thinking_inputs`


@dataclass
class GatingRecord:
    """What a learnable gating function read and decided, from which the policy pass works its weights out again.

    Attributes:
        ids, probs: (B, T, K) int32 and float32, the likeliest tokens and their probabilities.
        norm: (B, T) float32, ||p||_2 of the whole distribution.
        slots: (B, T, P) int16, where the peers of the bag stand in the group.
        temperature: (B, T) float32, T of eq. 5.
    """

    ids: torch.Tensor
    probs: torch.Tensor
    norm: torch.Tensor
    slots: torch.Tensor
    temperature: torch.Tensor

    @classmethod
    def zeros(cls, rows: int, length: int, entries: int, peers: int, device: torch.device) -> GatingRecord:
        """A record of B rows, T positions, K entries and P peers, to be filled."""
        shape = (rows, length)
        return cls(
            ids=torch.zeros(*shape, entries, dtype=torch.int32, device=device),
            probs=torch.zeros(*shape, entries, device=device),
            norm=torch.zeros(shape, device=device),
            slots=torch.zeros(*shape, peers, dtype=torch.int16, device=device),
            temperature=torch.zeros(shape, device=device),
        )

    def write(self, step: int, tokens: TopKTokens, slots: torch.Tensor, temperature: torch.Tensor) -> None:
        """Fills position `step`: slots (B, P) long, temperature 0-dim or (B,)."""
        self.ids[:, step], self.probs[:, step], self.norm[:, step] = tokens.ids, tokens.probs, tokens.norm.squeeze(-1)
        self.slots[:, step], self.temperature[:, step] = slots, temperature

    def positions(self, positions: slice) -> GatingRecord:
        """Some of its positions."""
        return GatingRecord(**{entry.name: getattr(self, entry.name)[:, positions] for entry in fields(self)})


@dataclass
class RolloutRecord:
    """The record of B rows and T completion positions; what a mode does not have is None.

    Attributes:
        logps: (B, T) float32, log-prob of each sampled token in the distribution it was sampled from; 0 behind the end
            of a row.
        thinking_mask: (B, T) bool, the tokens of the thinking phase; None without a mode.
        bag_ids, bag_weights: (B, T, K) int32 and float32, the thinking inputs; None where every input is its token's
            embedding (mode m3po with λ = 0 or groups of one).
        row_seeds: (B,) long, what ASLR's noise is made of; None where ASLR did not run.
        group_ids: (B,) integers; None where no pass needs whole groups.
        gating: what a learnable gating function read and decided; None with any other.
    """

    logps: torch.Tensor
    thinking_mask: torch.Tensor | None = None
    bag_ids: torch.Tensor | None = None
    bag_weights: torch.Tensor | None = None
    row_seeds: torch.Tensor | None = None
    group_ids: torch.Tensor | None = None
    gating: GatingRecord | None = None

    @classmethod
    def zeros(
        cls, rows: int, length: int, device: torch.device, *, thinks: bool = False, entries: int = 0
    ) -> RolloutRecord:
        """A record of B rows and T positions, to be filled: log-probs, with `thinks` the mask, bags of K `entries`."""
        record = cls(torch.zeros(rows, length, device=device))
        if thinks:
            record.thinking_mask = torch.zeros(rows, length, dtype=torch.bool, device=device)
        if entries:
            record.bag_ids = torch.zeros(rows, length, entries, dtype=torch.int32, device=device)
            record.bag_weights = torch.zeros(rows, length, entries, device=device)
        return record

    @property
    def has_bags(self) -> bool:
        """Whether any input may differ from its token's embedding."""
        return self.bag_ids is not None

    def write_bags(self, step: int, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Fills position `step` of a record with bags: (B, K) each."""
        assert self.bag_ids is not None and self.bag_weights is not None
        self.bag_ids[:, step], self.bag_weights[:, step] = ids, weights

    def cut(self, length: int) -> RolloutRecord:
        """The first T = `length` positions, as views."""
        return self._map(lambda value: value[:, :length] if value.dim() > 1 else value)

    def pad(self, length: int) -> RolloutRecord:
        """Exactly C = `length` positions: cut, or filled with zeros behind.

        The tensors are such that autograd may keep them: an engine that generates in inference mode leaves others.
        """
        return self._map(lambda value: _fit(value, length))

    def rows(self, rows: slice | torch.Tensor) -> RolloutRecord:
        """Some of its rows."""
        return self._map(lambda value: value[rows])

    @classmethod
    def join(cls, records: Sequence[RolloutRecord]) -> RolloutRecord:
        """The rows of several records of one kind, each filled with zeros to the longest."""
        length = max(record.logps.size(1) for record in records)
        batches = [record.pad(length).to_batch() for record in records]
        joined = cls.from_batch({name: torch.cat([batch[name] for batch in batches]) for name in batches[0]})
        assert joined is not None
        return joined

    def without_gradient(self) -> RolloutRecord:
        """For a pass without gradient, which takes the weights of the bags as they were rolled out."""
        return replace(self, gating=None)

    def to_batch(self) -> dict[str, torch.Tensor]:
        """Its tensors by their names in a trainer's batch, each with B rows."""
        batch = {f"{PREFIX}{name}": value for name, value in _tensors(self).items()}
        if self.gating is not None:
            batch |= {f"{GATING_PREFIX}{name}": value for name, value in _tensors(self.gating).items()}
        return batch

    @classmethod
    def from_batch(cls, batch: Mapping[str, Any]) -> RolloutRecord | None:
        """The record whose tensors lie in a batch; None where there is none."""
        values: dict[str, Any] = {entry.name: batch.get(f"{PREFIX}{entry.name}") for entry in fields(cls)}
        if values["logps"] is None:
            return None
        if f"{GATING_PREFIX}ids" in batch:
            names = [entry.name for entry in fields(GatingRecord)]
            values["gating"] = GatingRecord(**{name: batch[f"{GATING_PREFIX}{name}"] for name in names})
        return cls(**values)

    def tensors(self) -> list[torch.Tensor]:
        """All of them."""
        return [*self.to_batch().values()]

    def bag_arguments(self, positions: slice = slice(None)) -> dict[str, torch.Tensor]:
        """What a forward gets of the bags of some positions; {} where it is plain."""
        if self.bag_ids is None or self.bag_weights is None:
            return {}
        return dict(zip(BAG_ARGUMENTS, (self.bag_ids[:, positions], self.bag_weights[:, positions]), strict=True))

    def forward_kwargs(self, cross_path_lambda: float, has_thoughts: bool) -> dict[str, Any]:
        """The extra arguments of the forward of a scoring pass over these rows; {} where it is plain.

        Args:
            cross_path_lambda: λ, for the weights that a learnable gating function works out again.
            has_thoughts: whether the bags are soft thoughts (modes hrpo and h3po) or tokens of the group (m3po).
        """
        arguments: dict[str, Any] = self.bag_arguments()
        if arguments and self.gating is not None:
            arguments["thinking_gating"] = {
                "record": self.gating,
                "group_ids": self.group_ids,
                "cross_path_lambda": cross_path_lambda,
                "has_thoughts": has_thoughts,
            }
        if self.row_seeds is not None:
            arguments |= {"aslr_row_seeds": self.row_seeds, "is_m3po_inference": False}
        return arguments

    def _map(self, change: Any) -> RolloutRecord:
        changed = {name: change(value) for name, value in _tensors(self).items()}
        gating = self.gating
        if gating is not None:
            gating = replace(gating, **{name: change(value) for name, value in _tensors(gating).items()})
        return replace(self, **changed, gating=gating)


def _tensors(record: RolloutRecord | GatingRecord) -> dict[str, torch.Tensor]:
    """The tensors of a record by name, those of a record in it left out."""
    values = {entry.name: getattr(record, entry.name) for entry in fields(record)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def _fit(value: torch.Tensor, length: int) -> torch.Tensor:
    """(B, T, ...) cut or filled with zeros to (B, length, ...); (B,) as it is."""
    value = value.clone() if value.is_inference() else value
    if value.dim() == 1 or value.size(1) == length:
        return value
    if value.size(1) > length:
        return value[:, :length]
    missing = value.new_zeros(value.size(0), length - value.size(1), *value.shape[2:])
    return torch.cat([value, missing], dim=1)
