# SPDX-License-Identifier: Apache-2.0
"""The one function that mixes bags into the input of a model, in the decode loop and in every scoring pass alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..bag_vectors import bag_vectors
from ..flags import has_residual_gate
from ..shared_prefix import ARGUMENT, SharedPrefix, check_attention
from .policy_gating import recompute_bag_weights

ResidualGate = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def mix_bags(
    embed_tokens: Callable[[torch.Tensor], torch.Tensor],
    inputs_embeds: torch.Tensor,
    bag_ids: torch.Tensor | None,
    bag_weights: torch.Tensor | None,
    residual_gate: ResidualGate | None = None,
    trace: torch.Tensor | None = None,
) -> torch.Tensor:
    """Replaces token embeddings by thinking inputs, in the decode loop and in every scoring pass alike.

    Args:
        embed_tokens: the model's own input embedding, called as a module (FSDP, PEFT and padded vocabularies hold).
        inputs_embeds: (B, L, H), the embeddings of the input tokens.
        bag_ids, bag_weights: (B, T, K) int32 and float32 with T <= L, for the *last* T positions; both None for a plain
            forward.
        residual_gate: mixes embeddings (B, T, H) and the bags' vectors, see `model.thinking_residual`; without one the
            vector of a bag is the input.
        trace: (B, T, 2) float32, written if there is a residual gate: the mean of its a over H, 1 where there is no
            bag, and the L2 norm of the input.

    Returns:
        (B, L, H) in the dtype of `inputs_embeds`; sums are taken in fp32. Positions without a bag keep their token's
        embedding bit for bit. Weights are constants unless they require grad; gradient reaches the embedding matrix
        through the bag as through any input token.

    Raises:
        ValueError: one of the two tensors is missing, or the bags are longer than the input.
    """
    if bag_ids is None and bag_weights is None:
        return inputs_embeds
    if bag_ids is None or bag_weights is None:
        raise ValueError("thinking_bag_ids and thinking_bag_weights go together; one of them is missing.")
    batch, positions, _ = bag_ids.shape
    length, hidden = inputs_embeds.shape[1:]
    if batch != inputs_embeds.shape[0] or positions > length or bag_weights.shape != bag_ids.shape:
        raise ValueError(
            f"thinking_bag_ids {tuple(bag_ids.shape)} and thinking_bag_weights {tuple(bag_weights.shape)} must be "
            f"(B, T, K) with B = {inputs_embeds.shape[0]} and T <= {length}, the shape of the input."
        )
    own = inputs_embeds[:, length - positions :]
    mixed = bag_vectors(embed_tokens, bag_ids, bag_weights, hidden)
    has_bag = (bag_weights > 0).any(-1, keepdim=True)
    decay = None
    if residual_gate is not None:
        mixed, decay = residual_gate(own, mixed)
    tail = torch.where(has_bag, mixed.to(inputs_embeds.dtype), own)
    if trace is not None and decay is not None:
        ratio = torch.where(has_bag.squeeze(-1), decay.mean(-1), 1.0)
        trace.copy_(torch.stack([ratio, tail.float().norm(dim=-1)], dim=-1))
    return tail if positions == length else torch.cat([inputs_embeds[:, : length - positions], tail], dim=1)


def mix_thinking_inputs(model: Any, inputs_embeds: torch.Tensor, forward_kwargs: dict[str, Any]) -> torch.Tensor:
    """Hook of `LlamaModel.forward` and `Qwen2Model.forward`: the thinking inputs of the pass, if it has any.

    Args:
        model: the base model, for its `embed_tokens` and its residual gate if it has one.
        inputs_embeds: (B, L, H).
        forward_kwargs: the extra arguments of the forward; `thinking_bag_ids`, `thinking_bag_weights`,
            `thinking_trace`, `thinking_gating` (arguments of `recompute_bag_weights`) and `thinking_columns` are taken
            out of it, so that the layers never see them. The last, (B, T) long, says where the positions of the bags
            stand in rows that an engine has packed; without it they are the last ones. `shared_prefix` stays: it says
            where the rows of the bags stand in a stream (1, S, H), and the layers read it too.

    Returns:
        (B, L, H): the very tensor that came in when the pass has no bags.

    Raises:
        ValueError: the pass is over a stream or from a shared cache, and the model's attention knows of neither.
    """
    shared = forward_kwargs.get(ARGUMENT)
    if shared is not None:
        check_attention(model.config)
    bag_ids = forward_kwargs.pop("thinking_bag_ids", None)
    bag_weights = forward_kwargs.pop("thinking_bag_weights", None)
    trace = forward_kwargs.pop("thinking_trace", None)
    gating = forward_kwargs.pop("thinking_gating", None)
    if gating is not None and bag_ids is not None and bag_weights is not None:
        bag_weights = recompute_bag_weights(model.m3po_gating, model.embed_tokens, bag_ids, bag_weights, **gating)
    gate = model.thinking_residual if has_residual_gate(model) else None
    columns = forward_kwargs.pop("thinking_columns", None)
    if isinstance(shared, SharedPrefix) and bag_ids is not None:
        own = shared.completions(inputs_embeds)
        mixed = mix_bags(model.embed_tokens, own, bag_ids, bag_weights, gate, trace)
        return torch.cat([inputs_embeds[:, : shared.prompt_tokens], mixed.flatten(0, 1).unsqueeze(0)], dim=1)
    if columns is None:
        return mix_bags(model.embed_tokens, inputs_embeds, bag_ids, bag_weights, gate, trace)
    at = columns.unsqueeze(-1).expand(-1, -1, inputs_embeds.shape[-1])
    own = inputs_embeds.gather(1, at)
    return inputs_embeds.scatter(1, at, mix_bags(model.embed_tokens, own, bag_ids, bag_weights, gate, trace))
