# SPDX-License-Identifier: Apache-2.0
"""Who listens to whom: similarity of the paths' distributions and the weights A (M3PO paper, eq. 3-6).

Departures: a path that has left the thinking phase is masked out instead of getting similarity 0, which would still
carry weight; a path without an active peer keeps its own vector; only the current step is looked at; groups are given
by ids, in any order and of any size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..debugging import debugging, log_attention
from ..gating.base import Attention, BaseM3POGating, attention_weights
from ..gating.matched_temperature import MATCH, matched_temperature
from ..gating.parameter_free_gates import CosineGating, cosine_similarity

GatingFunction = Callable[[torch.Tensor], torch.Tensor]
Temperature = float | str  # a number above 0 or MATCH


def gating_name(gating_function: GatingFunction | None) -> str:
    """A gating function in the log."""
    if isinstance(gating_function, BaseM3POGating):
        return gating_function.describe()
    return "cosine" if gating_function is None else getattr(gating_function, "__name__", type(gating_function).__name__)


class PathGroups:
    """Where the paths of each group stand in a batch, worked out once per rollout.

    Args:
        group_ids: (B,) integers; rows with the same number belong together, in any order, of any group size.

    Attributes:
        members: (G, N) long, the rows of each group in the order of the batch; padded with row 0.
        present: (G, N) bool, False at the padding.
        group, slot: (B,) long, where a row stands in `members`.
        ring: (B, N) long, the slots of a row's group, its own first and then round the group; peers: (B, N) long, the
        rows at these slots.
    """

    def __init__(self, group_ids: torch.Tensor):
        if group_ids.ndim != 1 or group_ids.is_floating_point():
            raise ValueError(f"group_ids must be whole numbers of shape (B,), got {group_ids.dtype} {group_ids.shape}.")
        rows = torch.arange(len(group_ids), device=group_ids.device)
        _, self.group, sizes = torch.unique(group_ids, return_inverse=True, return_counts=True)
        order = torch.argsort(self.group, stable=True)
        starts = sizes.cumsum(0) - sizes
        self.slot = torch.empty_like(rows)
        self.slot[order] = rows - starts[self.group[order]]
        self.num_groups, self.size = len(sizes), int(sizes.max())
        self.members = rows.new_zeros(self.num_groups, self.size)
        self.members[self.group, self.slot] = rows
        self.present = torch.zeros_like(self.members, dtype=torch.bool)
        self.present[self.group, self.slot] = True
        steps = torch.arange(self.size, device=rows.device)
        self.ring = (self.slot.unsqueeze(-1) + steps) % self.size
        self.peers = self.members[self.group].gather(-1, self.ring)
        self._in_order = self.members.numel() == len(rows) and bool((self.members.flatten() == rows).all())

    def split(self, values: torch.Tensor) -> torch.Tensor:
        """(B, ...) -> (G, N, ...): a view when the groups lie one after the other, else a gather."""
        if self._in_order:
            return values.view(self.num_groups, self.size, *values.shape[1:])
        return values[self.members]

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """(G, N, ...) -> (B, ...): undoes `split`."""
        return values[self.group, self.slot]


def path_attention(
    probs: torch.Tensor,
    thinking_mask: torch.Tensor,
    groups: PathGroups,
    temperature: Temperature,
    gating_function: GatingFunction | None = None,
) -> Attention:
    """Weights A of eq. 5 inside each group, fp32 whatever comes in.

    Args:
        probs: (B, V), the distributions the current tokens were sampled from.
        thinking_mask: (B,) bool, the paths that take part.
        groups: the groups of the rows.
        temperature: T, above 0, or `match`.
        gating_function: similarity (G, N, V) -> (G, N, N); None is the cosine.
    """
    return group_attention(
        groups.split(probs.float()), groups.split(thinking_mask) & groups.present, temperature, gating_function
    )


def group_attention(
    probs: torch.Tensor, active: torch.Tensor, temperature: Temperature, gating_function: GatingFunction | None
) -> Attention:
    """As `path_attention`, of probs (..., N, V) float32 and active (..., N) bool that lie in groups already."""
    with torch.autocast(probs.device.type, enabled=False):
        similarity = (gating_function or cosine_similarity)(probs)
        scale: float | torch.Tensor
        if not isinstance(temperature, str):
            scale = temperature
        elif gating_function is None or isinstance(gating_function, CosineGating):
            scale = CosineGating.default_temperature
        else:
            baseline = attention_weights(cosine_similarity(probs), active, CosineGating.default_temperature)[0]
            scale = matched_temperature(similarity, active, baseline)
        weights, pairs = attention_weights(similarity, active, scale)
        return Attention(weights, similarity, pairs, scale)


def check_temperature(name: str, temperature: Temperature) -> None:
    """The rule of T.

    Raises:
        ValueError: it is neither above 0 nor `match`.
    """
    if temperature != MATCH and (isinstance(temperature, str) or not temperature > 0.0):
        raise ValueError(f"{name}={temperature} is not above 0; the paper uses 0.1. The only word is {MATCH!r}.")


def temperature_of(name: str, temperature: Temperature | None, gating_function: GatingFunction | None) -> Temperature:
    """T of an interaction whose gating function was given itself.

    Args:
        name: the argument that `temperature` is, for the error.
        temperature: what was asked for; None takes that of the gating function, and 0.1 where it has none.
        gating_function: a gating function brings the temperature it was made with, or the default of its class.

    Raises:
        ValueError: T breaks its rule, or the gating function was made with another one.
    """
    gating = gating_function if isinstance(gating_function, BaseM3POGating) else None
    if temperature is None:
        return CosineGating.default_temperature if gating is None else gating.temperature
    check_temperature(name, temperature)
    if gating is not None and gating.given_temperature not in (None, temperature):
        raise ValueError(
            f"{name}={temperature} and {gating.describe()} contradict each other: leave out one of the two "
            "temperatures."
        )
    return temperature


def check_distributions(probs: torch.Tensor) -> None:
    """Refuses distributions that are not finite; this waits for the device.

    Args:
        probs: (B, ..., V) floating.

    Raises:
        ValueError: the rows are named.
    """
    finite = probs.isfinite().flatten(1).all(-1)
    if not bool(finite.all()):
        rows = (~finite).nonzero().flatten().tolist()
        raise ValueError(f"probs is not finite in row {', '.join(map(str, rows))}: look for NaN in the model's logits.")


def mask_of(thinking_mask: torch.Tensor | Sequence[Any], like: torch.Tensor) -> torch.Tensor:
    """A mask as a bool tensor on the device of `like`, whose leading axes it has; a list will do.

    Raises:
        ValueError: its shape is another.
    """
    mask = torch.as_tensor(thinking_mask, device=like.device).bool()
    if mask.shape != like.shape[: mask.dim()] or mask.dim() == 0:
        raise ValueError(f"thinking_mask has the shape {tuple(mask.shape)} for rows {tuple(like.shape[:-1])}.")
    return mask


def cross_path_weights(
    probs: torch.Tensor,
    thinking_mask: torch.Tensor | Sequence[bool],
    *,
    group_ids: torch.Tensor | Sequence[int],
    temperature: Temperature | None = None,
    gating_function: GatingFunction | None = None,
    lambda_blend: float | None = None,
) -> torch.Tensor:
    """The weights A of eq. 5 for a whole batch: (B, B) float32.

    Args as `path_attention`, with `group_ids` (B,) integers instead of `groups`; mask and groups may be lists.
    `temperature` None is that of the gating function (`temperature_of`); `lambda_blend` is for the debug log.

    Returns:
        Entry (i, j) is how much path i listens to path j: zero across groups, on the diagonal and where i or j is not
        thinking; the row of an active path with an active peer sums to 1.

    Raises:
        ValueError: T breaks its rule, a distribution is not finite, or mask or groups do not fit the rows.
    """
    check_distributions(probs)
    mask = mask_of(thinking_mask, probs)
    groups = PathGroups(torch.as_tensor(group_ids, device=probs.device))
    scale = temperature_of("temperature", temperature, gating_function)
    attention = path_attention(probs, mask, groups, scale, gating_function)
    if debugging() or getattr(gating_function, "debug", False):
        active = groups.split(mask) & groups.present
        log_attention("interaction", attention, active, lambda_blend, gating_name(gating_function))
    weights = attention.weights
    batch = weights.new_zeros(len(probs), len(probs))
    # Padding points at row 0 with weight 0: it must add nothing rather than overwrite.
    return batch.scatter_add(1, groups.members[groups.group], groups.rows(weights))


def apply_cross_path_interaction(
    embeds: torch.Tensor,
    probs: torch.Tensor,
    thinking_mask: torch.Tensor | Sequence[bool],
    *,
    group_ids: torch.Tensor | Sequence[int],
    lambda_blend: float = 0.1,
    temperature: Temperature | None = None,
    gating_function: GatingFunction | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 2 and 6 on dense vectors: (1 - λ) e_i + λ Σ_j A_ij e_j.

    Args:
        embeds: (B, H), any floating dtype; probs, thinking_mask, group_ids, temperature and gating_function as in
            `cross_path_weights`.
        lambda_blend: λ in [0, 1].

    Returns:
        blended (B, H) in the dtype of `embeds`, computed in fp32: a path that is not thinking, or has no thinking peer,
        keeps its own vector bit for bit. weights (B, B) float32.

    Raises:
        ValueError: as `cross_path_weights`, or λ breaks its rule.
    """
    if not 0.0 <= lambda_blend <= 1.0:
        raise ValueError(f"lambda_blend={lambda_blend} is outside [0, 1]; the paper uses 0.1.")
    weights = cross_path_weights(
        probs,
        thinking_mask,
        group_ids=group_ids,
        temperature=temperature,
        gating_function=gating_function,
        lambda_blend=lambda_blend,
    )
    if lambda_blend == 0.0:
        return embeds, weights
    with torch.autocast(embeds.device.type, enabled=False):
        own = embeds.float()
        blended = (1.0 - lambda_blend) * own + lambda_blend * (weights @ own)
    listens = (weights > 0).any(-1, keepdim=True)
    return torch.where(listens, blended.to(embeds.dtype), embeds), weights
