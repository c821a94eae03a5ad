# SPDX-License-Identifier: Apache-2.0
"""One rollout in a thinking mode: who thinks, what, who listens to whom, and the record of it (E1-E3, E6)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ...utils import logging
from ..debugging import log_attention, log_thoughts
from ..gating import BaseM3POGating, create_gating_function
from ..settings import CROSS_PATH_MODES, ThinkingSettings
from ..thinking.bags import Peers, cross_path_bags, heard_peers
from ..thinking.interaction import Attention, GatingFunction, PathGroups, Temperature, gate_name, path_attention
from ..thinking.policy_gating import GatingRecord
from ..thinking.thoughts import Likeliest, blend_thoughts, likeliest
from .marker import AnswerMarker
from .statistics import AttentionSums, attention_statistics, residual_statistics

logger = logging.get_logger(__name__)

# Model types whose forward calls `mix_thinking_inputs` (the patches on LlamaModel and Qwen2Model).
SUPPORTED_MODEL_TYPES = ("llama", "qwen2")


class ThinkingRollout:
    """Allocates the record for B rows and `max_new_tokens` positions once, then fills one position a step.

    Args:
        settings: the numbers.
        group_ids: (B,) integers, on the device of the rollout.
        max_new_tokens: T at most.
        vocabulary: V, the width of the logits.
        embed_tokens: the model's input embedding.
        tokenizer: to find the answer marker; not needed in phase `all`.
        gating_function: similarity in place of the gate that the settings name; a learnable gate itself.
        temperature: T of eq. 5; None takes that of the settings.

    Attributes:
        thinking_mask: (B, T) bool, the tokens of the thinking phase.
        bag_ids, bag_weights: (B, T, K) int32 and float32; K is 0 when no input differs from its token's embedding
            (mode m3po with λ = 0 or groups of one).
        peers: (B, T, P) float32, how much each path listened to its peers; P is 0 when paths do not interact.
        trace: (B, T, 2) float32, see `mix_bags`; of width 0 in mode m3po.
        gating: what a learnable gate read and decided, for the policy pass; None with any other.

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
        self._temperature = settings.temperature if temperature is None else temperature
        self._debug = settings.logs_steps or bool(getattr(self._gate, "debug", False))
        self._embed_tokens = embed_tokens
        self._num_embeddings = getattr(embed_tokens, "base_layer", embed_tokens).num_embeddings  # LoRA wraps it
        self._crosses = settings.crosses and self.groups.size > 1
        num_peers = min(self.groups.size - 1, settings.cross_path_top_k or self.groups.size) if self._crosses else 0
        kept = min(settings.thought_top_k or vocabulary, vocabulary)
        entries = kept if settings.has_thoughts else num_peers
        if settings.mode == "m3po" and self._crosses:
            entries += 1  # the path itself
        self.thinking_mask = torch.zeros(rows, max_new_tokens, dtype=torch.bool, device=device)
        self.bag_ids = torch.zeros(rows, max_new_tokens, entries, dtype=torch.int32, device=device)
        self.bag_weights = torch.zeros(rows, max_new_tokens, entries, device=device)
        # In mode m3po the peers' weights are read back from the bag.
        self.peers = torch.zeros(rows, max_new_tokens, num_peers if settings.has_thoughts else 0, device=device)
        self.trace = torch.ones(rows, max_new_tokens, 2 if settings.has_thoughts else 0, device=device)
        self.gating: GatingRecord | None = None
        if self._crosses and getattr(self._gate, "learnable", False):
            self.gating = GatingRecord.zeros(rows, max_new_tokens, kept, num_peers, device)
        logger.info_once(f"M3PO mode {settings.mode}: {settings.describe()}")

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The record."""
        gating = [] if self.gating is None else [*self.gating.tensors().values()]
        return [self.thinking_mask, self.bag_ids, self.bag_weights, self.peers, self.trace, *gating]

    @property
    def _why_alone(self) -> str:
        """Why no path listens to another, for the log."""
        if self.settings.mode not in CROSS_PATH_MODES:
            return f"mode {self.settings.mode}"
        return "groups of one" if self.settings.crosses else f"lambda={self.settings.cross_path_lambda}"

    @property
    def has_bags(self) -> bool:
        """Whether any input may differ from its token's embedding."""
        return self.bag_ids.shape[-1] > 0

    def record(
        self,
        step: int,
        probs: torch.Tensor,
        completion_ids: torch.Tensor,
        was_unfinished: torch.Tensor,
        unfinished: torch.Tensor,
    ) -> None:
        """Records position `step`: the tokens just sampled and the bags of the inputs they become.

        Args:
            step: the position, a host number.
            probs: (B, V) float32, the distributions the tokens were sampled from.
            completion_ids: (B, step + 1) long.
            was_unfinished, unfinished: (B,) bool, the rows that were going before and that go on after these tokens.
        """
        thinking = was_unfinished
        if self._marker is not None:
            thinking = thinking & ~self._marker.update(completion_ids)
        self.thinking_mask[:, step] = thinking
        active = thinking & unfinished
        if not self.has_bags:
            if self._debug:
                log_thoughts(f"step {step}", active, None, self._why_alone)
            return
        kept = None
        if self.settings.has_thoughts or self.gating is not None:
            kept = likeliest(probs, self.settings.thought_top_k, self._num_embeddings)
        peers = self._listen(step, probs, kept, active) if self._crosses else None
        if self._debug and peers is None:
            log_thoughts(f"step {step}", active, None if kept is None else kept.probs, self._why_alone)
        share = self.settings.cross_path_lambda
        if kept is not None and self.settings.has_thoughts:
            ids, weights = kept.ids, kept.probs / kept.norm
            if peers is not None:
                self.peers[:, step] = peers.weights
                ids, weights = blend_thoughts(ids, weights, peers.weights, peers.rows, share)
            weights = weights * active.unsqueeze(-1)
        elif peers is not None:
            ids, weights = cross_path_bags(completion_ids[:, -1], peers.weights, peers.rows, share)
        self.bag_ids[:, step], self.bag_weights[:, step] = ids, weights

    def _listen(self, step: int, probs: torch.Tensor, kept: Likeliest | None, active: torch.Tensor) -> Peers:
        attention = self._attend(probs, kept, active)
        peers = heard_peers(attention.weights, self.groups, self.settings.cross_path_top_k)
        self._sums.add(attention, peers)
        if self.gating is not None and kept is not None:
            temperature = torch.as_tensor(attention.temperature, device=probs.device)
            by_row = temperature.flatten()[self.groups.group] if temperature.dim() else temperature
            self.gating.write(step, kept, peers.slots, by_row)
        if self._debug:
            took_part = self.groups.split(active) & self.groups.present
            share = self.settings.cross_path_lambda
            log_attention(f"step {step}", attention, took_part, share, gate_name(self._gate))
        return peers

    def _attend(self, probs: torch.Tensor, kept: Likeliest | None, active: torch.Tensor) -> Attention:
        gate = self._gate
        if self.gating is not None and kept is not None:  # a learnable gate reads what the policy pass will read
            ids, entries = self.groups.split(kept.ids), self.groups.split(kept.probs)
            gate = partial(_similarity_of, self._gate, entries, ids, self._embed_tokens)
        return path_attention(probs, active, self.groups, self._temperature, gate)

    def forward_kwargs(self, recorded: slice) -> dict[str, torch.Tensor]:
        """What the model's forward gets for the completion positions of its input; {} when nothing differs."""
        if not self.has_bags:
            return {}
        given = {
            "thinking_bag_ids": self.bag_ids[:, recorded],
            "thinking_bag_weights": self.bag_weights[:, recorded],
        }
        return given | ({"thinking_trace": self.trace[:, recorded]} if self.settings.has_thoughts else {})

    def end(self, steps: int) -> dict[str, torch.Tensor]:
        """Cuts the record to `steps` positions; returns the statistics of the rollout, {} if it has no bags."""
        self.thinking_mask, self.trace = self.thinking_mask[:, :steps], self.trace[:, :steps]
        self.bag_ids, self.bag_weights = self.bag_ids[:, :steps], self.bag_weights[:, :steps]
        self.peers = self.peers[:, :steps]
        if self.gating is not None:
            self.gating = self.gating.at(slice(steps))
        if not self.has_bags:
            return {}
        statistics = {}
        if self._crosses:
            peers = self.peers if self.settings.has_thoughts else self.bag_weights[..., 1:]
            statistics = attention_statistics(peers, self.thinking_mask, self.groups, self._sums)
            if isinstance(self._gate, BaseM3POGating):
                statistics |= self._gate.statistics()
        if self.settings.has_thoughts:
            statistics |= residual_statistics(self.trace, self.bag_weights)
        return statistics

    @property
    def embeds_ratio(self) -> torch.Tensor:
        """(B, T) float32, the share of the token's own embedding in its input: 1 where it is the input."""
        if self.settings.has_thoughts:
            return self.trace[..., 0]
        if not self.has_bags:
            return torch.ones(self.thinking_mask.shape, device=self.thinking_mask.device)
        return torch.where((self.bag_weights > 0).any(-1), self.bag_weights[..., 0], 1.0)


def _similarity_of(
    gate: Any, entries: torch.Tensor, ids: torch.Tensor, embed_tokens: Any, probs: torch.Tensor
) -> torch.Tensor:
    """A learnable gate's similarity of the likeliest tokens of `probs`, as a function of `probs`."""
    return gate(entries, ids=ids, embed_tokens=embed_tokens)
