# SPDX-License-Identifier: Apache-2.0
"""The rollouts of an engine: groups that were admitted in one step think together, by the functions of `generate`.

Axes: B rows of a cohort, R of them in the batch of a step, T positions, K bag entries, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers.m3po.gating.module import gating_of_model
from transformers.m3po.generation.rollout import ThinkingRollout
from transformers.m3po.settings import ThinkingSettings
from transformers.m3po.thinking.inputs import mix_bags
from transformers.m3po.thinking.record import BAG_ARGUMENTS, RolloutRecord
from transformers.m3po.thinking.residual_gate import thinking_residual

from .requests import Tag

STOPS_AT_MOST = -1  # fills the rows of `Cohort.stops`


class Member(NamedTuple):
    """A request of a cohort.

    Attributes:
        request: its id in the engine.
        tag: where it belongs.
        max_tokens: T at most.
        stops: the tokens that end it.
        greedy: whether its tokens are the likeliest ones.
    """

    request: str
    tag: Tag
    max_tokens: int
    stops: frozenset[int]
    greedy: bool


class Cohort:
    """Rows that took their first token in one step, and so take their k-th together; whole groups.

    Args:
        members: the rows.
        make: a `ThinkingRollout` of (group_ids, T).
        device: of the rollout.

    Raises:
        RuntimeError: a group is not whole.
    """

    def __init__(self, members: Sequence[Member], make: Any, device: torch.device):
        groups: dict[str, list[Member]] = {}
        for member in members:
            groups.setdefault(member.tag.group, []).append(member)
        for name, group in groups.items():
            if len(group) != group[0].tag.paths:
                raise RuntimeError(f"group {name} has {len(group)} of {group[0].tag.paths} paths in this step")
        ordered = [one for group in groups.values() for one in sorted(group, key=lambda member: member.tag.path)]
        self.groups = {name: len(group) for name, group in groups.items()}  # in the order of the rows
        self.rows = {member.request: row for row, member in enumerate(ordered)}  # of the requests that go on
        self.limits = torch.tensor([member.max_tokens for member in ordered], device=device)
        width = max(1, *(len(member.stops) for member in ordered))
        stops = [[*member.stops, *[STOPS_AT_MOST] * (width - len(member.stops))] for member in ordered]
        self.stops = torch.tensor(stops, device=device)
        self.greedy = ordered[0].greedy
        self.length, self.step = int(self.limits.max()), 0
        ids = torch.tensor([number for number, size in enumerate(self.groups.values()) for _ in range(size)])
        self.rollout: ThinkingRollout = make(ids.to(device), self.length)
        self.completions = torch.zeros(len(ordered), self.length, dtype=torch.long, device=device)
        self.unfinished = torch.ones(len(ordered), dtype=torch.bool, device=device)

    def write(
        self,
        rows: torch.Tensor | slice,
        tokens: torch.Tensor,
        probs: torch.Tensor,
        thought_probs: torch.Tensor | None,
    ) -> None:
        """Takes the tokens of a step.

        Args:
            rows: (R,) long, which rows they are of, or the slice of all rows.
            tokens: (R,) long.
            probs: (R, V) float32, what they were drawn from.
            thought_probs: (R, V) float32, what their thoughts are made of, if that is another.
        """
        step = self.step
        here = torch.zeros_like(self.unfinished)
        here[rows] = True
        was = self.unfinished & here
        self.completions[rows, step] = tokens
        chosen = probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).log()
        self.rollout.record.logps[rows, step] = torch.where(was[rows], chosen, 0.0)
        ends = (self.completions[:, step, None] == self.stops).any(-1) | (self.limits <= step + 1)
        self.unfinished = was & ~ends
        self.rollout.write(
            step,
            probs if thought_probs is None else thought_probs,
            self.completions[:, : step + 1],
            was,
            self.unfinished,
            None if isinstance(rows, slice) else rows,
        )
        self.step += 1

    def leave(self, request: str) -> None:
        """A request that the engine has let go of: ended, or taken back, and then its row leaves its group."""
        row = self.rows.pop(request)
        self.unfinished[row] = False

    def record_of(self, group: str) -> RolloutRecord:
        """The record of a group, its rows by their paths."""
        first = 0
        for name, size in self.groups.items():
            if name == group:
                return self.rollout.record.cut(self.step).rows(slice(first, first + size))
            first += size
        raise KeyError(group)

    def statistics(self) -> dict[str, torch.Tensor]:
        """Those of `ThinkingRollout.end`, when all rows have ended; {} while one goes on."""
        return {} if bool(self.unfinished.any()) else self.rollout.end(self.step)


class Rollouts:
    """All cohorts of an engine.

    Args:
        model: of vLLM.
        hyperparameters: the mode and its numbers, and `sampling_temperature`.
        tokenizer: to find the answer marker.
        vocabulary: V, the width of the logits.
        device: where it decodes.
    """

    def __init__(
        self, model: Any, hyperparameters: dict[str, Any], tokenizer: Any, vocabulary: int, device: torch.device
    ):
        known = ThinkingSettings.__dataclass_fields__
        self.settings = ThinkingSettings(**{name: hyperparameters[name] for name in hyperparameters if name in known})
        self.sampling_temperature = float(hyperparameters["sampling_temperature"])
        base = model.model
        self._embed_tokens, self._device = base.embed_tokens, device
        self._residual_gate = partial(thinking_residual, base) if self.settings.has_thoughts else None
        learned = None
        if self.settings.learns:
            learned = gating_of_model(_Headed(base), self.settings.gating_type, self.settings.gating_config)
        self._make = partial(_rollout, self.settings, vocabulary, self._embed_tokens, tokenizer, learned)
        self._cohorts: list[Cohort] = []
        self._of: dict[str, Cohort] = {}  # by request
        self._kept: dict[str, Cohort] = {}  # by group, until its record is taken
        self._batch: tuple[list[str], list[_Part]] = ([], [])

    @property
    def groups(self) -> list[str]:
        """Those whose record is kept, in the order of their beginning."""
        return [*self._kept]

    def thinks(self, requests: Sequence[str]) -> bool:
        """Whether any of these requests does."""
        return any(request in self._of for request in requests)

    def admit(self, members: Sequence[Member]) -> None:
        """Requests that take their first token in this step."""
        for greedy in {member.greedy for member in members}:  # their thoughts are of other distributions
            chosen = [member for member in members if member.greedy is greedy]
            cohort = Cohort(chosen, self._make, self._device)
            self._batch = ([], [])
            self._cohorts.append(cohort)
            self._of |= dict.fromkeys(cohort.rows, cohort)
            self._kept |= dict.fromkeys((one.tag.group for one in chosen if one.tag.recorded), cohort)

    def leave(self, request: str) -> None:
        """A request that the engine has let go of."""
        cohort = self._of.pop(request, None)
        if cohort is not None:
            cohort.leave(request)
            self._batch = ([], [])
            if not cohort.rows:
                self._cohorts.remove(cohort)

    def take_records(self, groups: Sequence[str]) -> tuple[RolloutRecord, dict[str, float]]:
        """The record of groups that have ended, which is not kept any longer, and the statistics of their rollouts.

        Args:
            groups: by whose order the rows come, and in each by their paths.

        Returns:
            The record of all rows; the numbers of `ThinkingRollout.end`, over several cohorts their mean by rows.

        Raises:
            KeyError: no record is kept of such a group.
        """
        cohorts = [self._kept[group] for group in groups]
        record = RolloutRecord.join([cohort.record_of(group) for cohort, group in zip(cohorts, groups, strict=True)])
        for group in groups:
            del self._kept[group]
        sums: dict[str, list[float]] = {}
        for cohort in {id(cohort): cohort for cohort in cohorts}.values():
            for name, value in cohort.statistics().items():
                total = sums.setdefault(name, [0.0, 0])
                total[0] += float(value) * len(cohort.limits)
                total[1] += len(cohort.limits)
        return record, {name: total / rows for name, (total, rows) in sums.items()}

    def _parts(self, requests: list[str]) -> list[_Part]:
        """Where the rows of each cohort stand in a batch; worked out when the batch changes.

        Raises:
            RuntimeError: a row that goes on is not in the batch.
        """
        if self._batch[0] != requests:
            parts = []
            for cohort in self._cohorts:
                places = [(place, cohort.rows[one]) for place, one in enumerate(requests) if one in cohort.rows]
                if len(places) != len(cohort.rows):
                    raise RuntimeError(f"{len(cohort.rows) - len(places)} paths of a group were left out of a step")
                at, rows = ([*numbers] for numbers in zip(*places, strict=True))
                # Of what is all there and in order, nothing is copied.
                parts.append(_Part(cohort, self._index(at, len(requests)), self._index(rows, len(cohort.limits))))
            self._batch = (list(requests), parts)
        return self._batch[1]

    def _index(self, places: list[int], length: int) -> torch.Tensor | slice:
        """Places among `length`, on the device; the slice of all where they are that."""
        if places == list(range(length)):
            return slice(None)
        return torch.tensor(places, device=self._device)

    def write(self, requests: list[str], tokens: torch.Tensor, probs: torch.Tensor, scores: torch.Tensor) -> None:
        """Takes the tokens of a step, (R,) long in the order of `requests`, with what they were drawn from, (R, V)."""
        for cohort, at, rows in self._parts(requests):
            thoughts = None
            if self.settings.has_thoughts and cohort.greedy and self.sampling_temperature != 1.0:
                thoughts = (scores[at] / self.sampling_temperature).softmax(-1)
            cohort.write(rows, tokens[at].long(), probs[at], thoughts)

    def mix(self, requests: list[str], embeds: torch.Tensor, starts: torch.Tensor) -> None:
        """Puts the thinking inputs of the last tokens in place of their embeddings.

        Args:
            requests: of the batch.
            embeds: (tokens, H), the inputs of the pass; written to.
            starts: (R,) long, where the first token of each request stands in it; a request that thinks has one.
        """
        for cohort, at, rows in self._parts(requests):
            if not cohort.step:
                continue
            arguments = cohort.rollout.forward_kwargs(slice(cohort.step - 1, cohort.step))
            if not arguments:
                continue
            ids, weights = (arguments[name][rows] for name in BAG_ARGUMENTS)
            whole = arguments.get("thinking_trace")
            trace = None if whole is None else whole[rows]
            where = starts[at]
            own = embeds[where].unsqueeze(1)
            embeds[where] = mix_bags(self._embed_tokens, own, ids, weights, self._residual_gate, trace).squeeze(1)
            if whole is not None and trace is not None:
                whole[rows] = trace


class _Part(NamedTuple):
    """A cohort in a batch: where its requests stand there, and which of its rows they are; (R,) long each, or the slice
    of all.
    """

    cohort: Cohort
    at: torch.Tensor | slice
    rows: torch.Tensor | slice


class _Headed:
    """A base model of vLLM as the functions of Transformers take a model with its head."""

    def __init__(self, base: Any):
        self.base_model, self.config = base, base.config


def _rollout(
    settings: ThinkingSettings,
    vocabulary: int,
    embed_tokens: Any,
    tokenizer: Any,
    gating: Any,
    group_ids: torch.Tensor,
    length: int,
) -> ThinkingRollout:
    return ThinkingRollout(settings, group_ids, length, vocabulary, embed_tokens, tokenizer, gating)
