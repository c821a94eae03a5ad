# SPDX-License-Identifier: Apache-2.0
"""One rollout in a thinking mode: who thinks, what, who listens to whom, and the record of it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ...utils import logging
from ..debugging import log_attention, log_thoughts
from ..gating import BaseM3POGating, create_gating_function
from ..settings import CROSS_PATH_MODES, ThinkingSettings
from ..thinking.bags import Peers, cross_path_bags, exchange_groups, select_peers
from ..thinking.interaction import Attention, GatingFunction, PathGroups, Temperature, gating_name, path_attention
from ..thinking.record import GatingRecord, RolloutRecord
from ..thinking.thoughts import TopKTokens, blend_thoughts, top_k_tokens
from .marker import AnswerMarker
from .statistics import AttentionSums, attention_statistics, residual_statistics

logger = logging.get_logger(__name__)


class ThinkingRollout:
    """Allocates its record for B rows and `max_new_tokens` positions once, then fills one position a step.

    Args:
        settings: the numbers.
        group_ids: (B,) integers, on the device of the rollout.
        max_new_tokens: T at most.
        vocabulary: V, the width of the logits.
        embed_tokens: the model's input embedding.
        tokenizer: to find the answer marker; not needed in phase `all`.
        gating_function: similarity in place of the gating function that the settings name; a learnable gating function
            itself.
        temperature: T of eq. 5; None takes that of the settings.

    Attributes:
        record: `RolloutRecord`; its log-probs are written by who owns this rollout.
        peers: (B, T, P) float32, how much each path listened to its peers; P is 0 when paths do not interact, and in
            mode m3po, where the record's bags say it.
        trace: (B, T, 2) float32, see `mix_bags`; of width 0 in mode m3po.

    Raises:
        ValueError: the phase needs a tokenizer and there is none.
    """

    def __init__(
        self,
        settings: ThinkingSettings,
        group_ids: torch.Tensor,
        max_new_tokens: int,
        vocabulary: int,
        embed_tokens: Any,
        tokenizer: Any,
        gating_function: GatingFunction | None,
        temperature: Temperature | None = None,
    ):
        rows, device = len(group_ids), group_ids.device
        self.settings = settings
        self.groups = PathGroups(group_ids)
        self._marker: AnswerMarker | None = None
        if settings.cross_path_phase == "thinking":
            if tokenizer is None:
                raise ValueError(
                    f"tokenizer is needed to find the answer marker {settings.answer_start!r}: pass tokenizer=... to "
                    "generate, or set cross_path_phase='all'."
                )
            self._marker = AnswerMarker(tokenizer, settings.answer_start, rows, device)
        self._gate: Any = gating_function
        if gating_function is None and settings.mode in CROSS_PATH_MODES:
            options = {name: value for name, value in settings.gating_config.items() if name != "temperature"}
            self._gate = create_gating_function(settings.gating_type, options)
        self._sums = AttentionSums(device)
        self._last_probs: torch.Tensor | None = None
        self._temperature = settings.temperature if temperature is None else temperature
        self._debug = settings.logs_steps or bool(getattr(self._gate, "debug", False))
        self._embed_tokens = embed_tokens
        self._num_embeddings = getattr(embed_tokens, "base_layer", embed_tokens).num_embeddings  # LoRA wraps it
        self._crosses = settings.crosses and self.groups.size > 1
        self._exchanges = self._crosses and getattr(self._gate, "other_group", False)
        if self._exchanges and self.groups.num_groups < 2:
            raise ValueError(
                f"gating_type={settings.gating_type!r} hears the paths of another group, and there is one alone: roll "
                "out two prompts or more at a time, or take another gating_type."
            )
        num_peers = min(self.groups.size - 1, settings.cross_path_top_k or self.groups.size) if self._crosses else 0
        num_entries = min(settings.thought_top_k or vocabulary, vocabulary)
        entries = num_entries if settings.has_thoughts else num_peers
        if settings.mode == "m3po" and self._crosses:
            entries += 1  # the path itself
        self.record = RolloutRecord.zeros(rows, max_new_tokens, device, thinks=True, entries=entries)
        # In mode m3po the peers' weights are read back from the bag.
        self.peers = torch.zeros(rows, max_new_tokens, num_peers if settings.has_thoughts else 0, device=device)
        self.trace = torch.ones(rows, max_new_tokens, 2 if settings.has_thoughts else 0, device=device)
        if self._crosses and getattr(self._gate, "learnable", False):
            self.record.gating = GatingRecord.zeros(rows, max_new_tokens, num_entries, num_peers, device)
        logger.info_once(f"M3PO mode {settings.mode}: {settings.describe()}")

    @property
    def buffers(self) -> list[torch.Tensor]:
        """What is kept for the statistics, beside the record."""
        return [self.peers, self.trace]

    @property
    def _why_alone(self) -> str:
        """Why no path listens to another, for the log."""
        if self.settings.mode not in CROSS_PATH_MODES:
            return f"mode {self.settings.mode}"
        return "groups of one" if self.settings.crosses else f"lambda={self.settings.cross_path_lambda}"

    def write(
        self,
        step: int,
        probs: torch.Tensor,
        completion_ids: torch.Tensor,
        was_unfinished: torch.Tensor,
        unfinished: torch.Tensor,
        rows: torch.Tensor | None = None,
    ) -> None:
        """Fills position `step` of the record: the tokens just sampled and the bags of the inputs they become.

        Args:
            step: the position, a host number.
            probs: (R, V) float32, the distributions the tokens were sampled from.
            completion_ids: (B, step + 1) long.
            was_unfinished, unfinished: (B,) bool, the rows that were going before and that go on after these tokens.
            rows: (R,) long, which rows `probs` are of, where an engine has let go of the others, which had ended
                before; None where they are of all rows.
        """
        thinking = was_unfinished
        if self._marker is not None:
            thinking = thinking & ~self._marker.update(completion_ids)
        assert self.record.thinking_mask is not None
        self.record.thinking_mask[:, step] = thinking
        active = thinking & unfinished
        if not self.record.has_bags:
            if self._debug:
                log_thoughts(f"step {step}", active, None, self._why_alone)
            return
        tokens = None
        if self.settings.has_thoughts or self.record.gating is not None:
            tokens = top_k_tokens(probs, self.settings.thought_top_k, self._num_embeddings)
            if rows is not None:
                tokens = tokens.spread(rows, len(active))
        peers = None
        if self._crosses:
            peers = self._select_peers(step, self._of_all_rows(probs, rows), tokens, active)
        if self._debug and peers is None:
            log_thoughts(f"step {step}", active, None if tokens is None else tokens.probs, self._why_alone)
        cross_path_lambda = self.settings.cross_path_lambda
        if tokens is not None and self.settings.has_thoughts:
            ids, weights = tokens.ids, tokens.probs / tokens.norm
            if peers is not None:
                self.peers[:, step] = peers.weights
                ids, weights = blend_thoughts(ids, weights, peers.weights, peers.rows, cross_path_lambda)
            weights = weights * active.unsqueeze(-1)
        elif peers is not None:
            ids, weights = cross_path_bags(completion_ids[:, -1], peers.weights, peers.rows, cross_path_lambda)
        self.record.write_bags(step, ids, weights)

    def _of_all_rows(self, probs: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        """(R, V) -> (B, V). A row that has ended keeps some distribution, which no path listens to."""
        if rows is None:
            return probs
        if self._last_probs is None:
            self._last_probs = probs.new_full((len(self.groups.group), probs.shape[-1]), 1.0 / probs.shape[-1])
        return self._last_probs.index_copy_(0, rows, probs)

    def _select_peers(self, step: int, probs: torch.Tensor, tokens: TopKTokens | None, active: torch.Tensor) -> Peers:
        attention = self._attention(probs, tokens, active)
        peers = select_peers(attention.weights, self.groups, self.settings.cross_path_top_k)
        if self._exchanges:
            peers = exchange_groups(peers, self.groups, active)
        self._sums.add(attention, peers)
        if self.record.gating is not None and tokens is not None:
            temperature = torch.as_tensor(attention.temperature, device=probs.device)
            by_row = temperature.flatten()[self.groups.group] if temperature.dim() else temperature
            self.record.gating.write(step, tokens, peers.slots, by_row)
        if self._debug:
            participating = self.groups.split(active) & self.groups.present
            name = gating_name(self._gate)
            log_attention(f"step {step}", attention, participating, self.settings.cross_path_lambda, name)
        return peers

    def _attention(self, probs: torch.Tensor, tokens: TopKTokens | None, active: torch.Tensor) -> Attention:
        gating = self._gate
        if self.record.gating is not None and tokens is not None:  # it reads what the policy pass will read
            ids, entries = self.groups.split(tokens.ids), self.groups.split(tokens.probs)
            gating = partial(_similarity_of, self._gate, entries, ids, self._embed_tokens)
        return path_attention(probs, active, self.groups, self._temperature, gating)

    def forward_kwargs(self, positions: slice) -> dict[str, torch.Tensor]:
        """What the model's forward gets for the completion positions of its input; {} when nothing differs."""
        arguments = self.record.bag_arguments(positions)
        if arguments and self.settings.has_thoughts:
            arguments["thinking_trace"] = self.trace[:, positions]
        return arguments

    def end(self, steps: int) -> dict[str, torch.Tensor]:
        """Cuts everything to `steps` positions; returns the statistics of the rollout, {} if it has no bags."""
        self.record, self.trace, self.peers = self.record.cut(steps), self.trace[:, :steps], self.peers[:, :steps]
        mask, bag_weights = self.record.thinking_mask, self.record.bag_weights
        if bag_weights is None or mask is None:
            return {}
        statistics = {}
        if self._crosses:
            peers = self.peers if self.settings.has_thoughts else bag_weights[..., 1:]
            statistics = attention_statistics(peers, mask, self.groups, self._sums)
            if isinstance(self._gate, BaseM3POGating):
                statistics |= self._gate.statistics()
        if self.settings.has_thoughts:
            statistics |= residual_statistics(self.trace, bag_weights)
        return statistics

    @property
    def embeds_ratio(self) -> torch.Tensor:
        """(B, T) float32, the weight of the token's own embedding in its input: 1 where it is the input."""
        if self.settings.has_thoughts:
            return self.trace[..., 0]
        weights = self.record.bag_weights
        if weights is None:
            return torch.ones(self.record.logps.shape, device=self.record.logps.device)
        return torch.where((weights > 0).any(-1), weights[..., 0], 1.0)


def _similarity_of(
    gating: Any, entries: torch.Tensor, ids: torch.Tensor, embed_tokens: Any, probs: torch.Tensor
) -> torch.Tensor:
    """A learnable gating function's similarity of the likeliest tokens of `probs`, as a function of `probs`."""
    return gating(entries, ids=ids, embed_tokens=embed_tokens)
