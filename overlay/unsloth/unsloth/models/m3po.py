# SPDX-License-Identifier: Apache-2.0
"""Thinking inputs and ASLR on Unsloth's fast paths: what the hooks in its files and in unsloth_zoo's call.

Unsloth has its own forwards, decode step, log-prob pass and GRPO loss. The model's side is the same code as in
Transformers (`transformers.m3po`), called with what these forwards have at hand; the trainer's side (`ScoredRows`)
hands what TRL's hooks recorded to the passes that score a rollout. Their rows are packed to the left, so each row's
completion starts elsewhere.

Axes: B rows, C completion positions of the padded batch, L input positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers.m3po.aslr.modules import pop_aslr_inputs
from transformers.m3po.aslr.modules import refine_states as _refine_states
from transformers.m3po.flags import has_aslr, has_hyper_connections
from transformers.m3po.modules import ADDED_MODULES
from transformers.m3po.thinking.inputs import mix_thinking_inputs as _mix_thinking_inputs
from transformers.m3po.thinking.record import BAG_ARGUMENTS, RolloutRecord
from transformers.utils import logging

from . import _decode_graphs

__all__ = [
    "UNQUANTIZED",
    "ScoredRows",
    "begin_step",
    "make_float32",
    "mix_step_inputs",
    "mix_thinking_inputs",
    "without_added_modules",
    "reads_final_norm",
    "refine_states",
    "pop_aslr_inputs",
    "with_added_modules",
]

logger = logging.get_logger(__name__)

_OWN = tuple(name for modules in ADDED_MODULES for name in modules.names)
# What 4-bit and 8-bit loading leaves alone, as patterns that upstream matches from the start of a module's full name.
UNQUANTIZED = [rf".*\b{name}\b" for name in _OWN]


def mix_thinking_inputs(model: Any, inputs_embeds: torch.Tensor, forward_kwargs: dict[str, Any]) -> torch.Tensor:
    """Hook at the top of both forwards, see `transformers.m3po.thinking.inputs.mix_thinking_inputs`.

    Raises:
        ValueError: the model has hyper-connections, which Unsloth's fast paths would leave out.
    """
    refuse_hyper_connections(model)
    return _mix_thinking_inputs(model, inputs_embeds, forward_kwargs)


def refuse_hyper_connections(model: Any) -> None:
    """Unsloth's fast forwards replace the decoder layers, residual adds and all.

    Raises:
        ValueError: the model has hyper-connections.
    """
    if has_hyper_connections(model):
        raise ValueError(
            "mhc_enabled=True does not work with Unsloth: its fast paths add residuals of their own and would leave "
            "the hyper-connections out. Load the model with Transformers and train it with engine=trl, or set "
            "mhc_enabled=False."
        )


def refine_states(
    model: Any, hidden_states: torch.Tensor, position_ids: torch.Tensor | None, inputs: dict[str, Any]
) -> torch.Tensor:
    """Hook of both forwards, see `transformers.m3po.aslr.modules.refine_states`; position ids of None count from 0."""
    if position_ids is None:
        position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device).unsqueeze(0)
    return _refine_states(model, hidden_states, position_ids.long(), inputs)


def reads_final_norm(model: Any) -> bool:
    """Whether the base model reads the output of its last norm more than once, so that the gradient is shared."""
    return has_aslr(model)


def begin_step(causal_lm: Any, input_ids: torch.Tensor, forward_kwargs: dict[str, Any]) -> bool:
    """Hook of a decode step, before upstream may replay it from a captured graph.

    A graph reads its inputs from fixed places. So where graphs are on, the inputs of the step are mixed here, into a
    buffer that `mix_step_inputs` hands to the step, captured or not; the bags are taken out of `forward_kwargs`. Once a
    number of rows has such a buffer, every step of as many rows reads it, with bags or without.

    Args:
        causal_lm: the model with its head; the buffers are kept on its base model.
        input_ids: (B, 1).
        forward_kwargs: the extra arguments of the forward.

    Returns:
        Whether a graph would leave something out: the inner loop of ASLR, whose inputs differ from step to step.
    """
    model, rows = causal_lm.model, len(input_ids)
    buffers = model.__dict__.setdefault("_m3po_step_inputs", {})
    model.__dict__["_m3po_step"] = None
    refuse_hyper_connections(model)
    if has_aslr(model):
        return True
    if not _decode_graphs.enabled() or not (rows in buffers or any(name in forward_kwargs for name in BAG_ARGUMENTS)):
        return False
    inputs = mix_thinking_inputs(model, model.embed_tokens(input_ids), forward_kwargs)
    if rows not in buffers or buffers[rows].dtype != inputs.dtype or buffers[rows].device != inputs.device:
        with torch.inference_mode(False):  # it is written in other modes too
            buffers[rows] = torch.empty(inputs.shape, dtype=inputs.dtype, device=inputs.device)
        _decode_graphs.invalidate(causal_lm)  # those of as many rows read no buffer
    buffers[rows].copy_(inputs)
    model.__dict__["_m3po_step"] = buffers[rows]
    return False


def mix_step_inputs(model: Any, inputs_embeds: torch.Tensor, forward_kwargs: dict[str, Any]) -> torch.Tensor:
    """Hook of the decode step: the thinking inputs, (B, 1, H), mixed here or by `begin_step` of this step."""
    prepared = model.__dict__.get("_m3po_step")
    if prepared is None:
        return mix_thinking_inputs(model, inputs_embeds, forward_kwargs)
    return prepared.to(inputs_embeds.dtype, copy=True)  # upstream writes into what it gets


def with_added_modules(model: Any, modules_to_save: list[str] | None) -> list[str] | None:
    """Hook of `get_peft_model`: adds the modules of this overlay that the model has; an adapter trains them whole."""
    refuse_hyper_connections(model)
    has = [name for modules in ADDED_MODULES if modules.on(model) for name in modules.names]
    missing = [name for name in has if name not in (modules_to_save or [])]
    return [*(modules_to_save or []), *missing] if missing else modules_to_save


def without_added_modules(modules_to_save: Iterable[str]) -> list[str]:
    """Hook of `get_peft_model`: the names that upstream has to judge."""
    return [name for name in modules_to_save if name.rpartition(".")[2] not in _OWN]


def make_float32(model: Any) -> None:
    """Hook of `patch_peft_model`: the parameters of our modules in float32, whatever the load has cast them to."""
    named = dict(model.named_parameters())
    for modules in ADDED_MODULES:
        for name in modules.among(named):
            named[name].data = named[name].data.float()


class ScoredRows:
    """What a pass over a rollout gets beside its tokens, row by row, on Unsloth's log-prob pass and in its loss.

    Args:
        trainer: the trainer, patched or not.
        input_ids: (B, L), prompts padded on the left and completions on the right, before upstream packs them.
        logits_to_keep: C.
        record: of these rows, or None where the pass is plain.
        batch: the micro-batch of the loss, whose record is compared with the policy pass; None in the other passes.

    Raises:
        ValueError: a mini-batch of the loss would split the groups that a learnable gating function needs.
    """

    def __init__(
        self,
        trainer: Any,
        input_ids: torch.Tensor,
        logits_to_keep: int,
        record: RolloutRecord | None,
        batch: dict[str, Any] | None = None,
    ):
        self._trainer, self._record, self._batch = trainer, record, batch
        self._length = input_ids.shape[1]
        if record is not None or batch is not None:
            # Upstream packs a row by a stable sort that puts all padding last; the inverse says where a token went.
            order = (input_ids == trainer.processing_class.pad_token_id).long().argsort(dim=1, stable=True)
            self._columns = order.argsort(dim=1)[:, self._length - logits_to_keep :]
            self._packed_mask = input_ids.gather(1, order) != trainer.processing_class.pad_token_id
        if not self.may_pack:
            logger.warning_once(
                "Unsloth's sequence packing and prefix grouping are off: thinking inputs belong to one row each."
            )

    @classmethod
    def of_batch(
        cls, trainer: Any, input_ids: torch.Tensor, logits_to_keep: int, batch: dict[str, Any] | None
    ) -> ScoredRows:
        """Those of the loss over a micro-batch; None comes from a trainer without hooks."""
        record = trainer.m3po.policy_inputs(batch) if batch else None
        return cls(trainer, input_ids, logits_to_keep, record, batch)

    @property
    def may_pack(self) -> bool:
        """Whether rows may be joined to one, or share a prompt: not when a row brings inputs of its own."""
        return self._record is None

    def add_to(self, chunks: list[dict[str, Any]], batch_size: int) -> list[dict[str, Any]]:
        """The forward's extra arguments of each mini-batch of `batch_size` rows, with ours."""
        if self._record is None:
            return chunks
        group_ids = self._record.group_ids
        extended = []
        for index, chunk in enumerate(chunks):
            rows = slice(index * batch_size, (index + 1) * batch_size)
            ours = self._trainer.m3po.model_inputs(rows, self._packed_mask[rows], self._record)
            if group_ids is not None and torch.isin(group_ids[rows], group_ids[rows.stop :]).any():
                raise ValueError(
                    f"a learnable gating function needs whole groups, and a mini-batch of {batch_size} rows splits "
                    "one; set unsloth_grpo_mini_batch=1."
                )
            if self._record.has_bags:
                ours["thinking_columns"] = self._columns[rows]
            extended.append({**chunk, **ours})
        return extended

    def log_rollout_diff(self, logps: torch.Tensor) -> None:
        """Logs how far the policy pass is from the rollout: logps (B, W), for the last W columns of the packed rows."""
        if self._batch is None:
            return
        columns = self._columns - (self._length - logps.shape[1])
        scored = self._batch["completion_ids"] != self._trainer.processing_class.pad_token_id  # as upstream has it
        mask = self._batch["completion_mask"] * (columns >= 0) * scored
        self._trainer.m3po.log_rollout_diff(self._batch, logps.detach().gather(1, columns.clamp_min(0)), mask)
