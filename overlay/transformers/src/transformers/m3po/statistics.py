# SPDX-License-Identifier: Apache-2.0
"""What the paths did, in numbers: computed on the device, once per rollout, from what the rollout recorded (E12, E19).

In mode m3po the attention statistics come from the recorded bags, whose first entry is the path itself and whose other
entries are λ A_ij of its peers: A is read back from them. Only the similarity, which no record holds, is summed up step
by step.
"""

from __future__ import annotations

import torch

from .interaction import PathGroups


class SimilaritySums:
    """Running sum, count, smallest and largest similarity over the pairs that may exchange; device scalars."""

    def __init__(self, device: torch.device):
        self.total = torch.zeros((), device=device)
        self.count = torch.zeros((), device=device)
        self.smallest = torch.full((), torch.inf, device=device)
        self.largest = torch.full((), -torch.inf, device=device)

    def add(self, similarity: torch.Tensor, pairs: torch.Tensor) -> None:
        """similarity (G, N, N) float32, pairs (G, N, N) bool."""
        self.total += torch.where(pairs, similarity, 0.0).sum()
        self.count += pairs.sum()
        self.smallest = torch.minimum(self.smallest, torch.where(pairs, similarity, torch.inf).amin())
        self.largest = torch.maximum(self.largest, torch.where(pairs, similarity, -torch.inf).amax())


def attention_statistics(
    peers: torch.Tensor, thinking_mask: torch.Tensor, groups: PathGroups, similarity: SimilaritySums
) -> dict[str, torch.Tensor]:
    """Means over the blended positions of a rollout; every value is a 0-dim float32 tensor on the device.

    Args:
        peers: (B, T, P) float32, A of a path's peers or λ A, zero where it listened to nobody.
        thinking_mask: (B, T) bool.
        groups: the groups of the rows.
        similarity: the similarities of the rollout.

    Returns:
        attention_entropy: entropy of A over the peers, in nats. attention_max: the largest weight of A.
        attention_variance: variance of A over the active peers. active_paths: thinking paths of a group, over the
        groups and steps with at least one. similarity_mean, similarity_min, similarity_max: over the pairs that could
        exchange. NaN where a rollout blended nothing.
    """
    attention = peers / peers.sum(-1, keepdim=True).clamp_min(torch.finfo(peers.dtype).tiny)
    blended = (attention > 0).any(-1)
    count = blended.sum()
    # The mean of A over n active peers is 1 / n, so its variance is mean(A^2) - 1 / n^2.
    num_peers = (attention > 0).sum(-1).clamp_min(1)
    variance = (attention.square().sum(-1) / num_peers - 1.0 / num_peers.square()).clamp_min(0.0)
    per_group = (groups.split(thinking_mask) & groups.present.unsqueeze(-1)).sum(1).float()  # (G, T)
    return {
        "attention_entropy": torch.special.entr(attention).sum() / count,
        "attention_max": attention.amax(-1).sum() / count,
        "attention_variance": torch.where(blended, variance, 0.0).sum() / count,
        "active_paths": per_group.sum() / (per_group > 0).sum(),
        "similarity_mean": similarity.total / similarity.count,
        "similarity_min": torch.where(similarity.count > 0, similarity.smallest, torch.nan),
        "similarity_max": torch.where(similarity.count > 0, similarity.largest, torch.nan),
    }


def residual_statistics(trace: torch.Tensor, bag_weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the residual gate did, means over the thinking inputs that were read; 0-dim float32 tensors on the device.

    Args:
        trace: (B, T, 2) float32, see `mix_bags`.
        bag_weights: (B, T, K) float32, zero where there was no thought.

    Returns:
        embeds_ratio: the gate's a, mean over H. hidden_ratio: sqrt(1 - embeds_ratio²) of each position, HRPO's measure
        of how much thought there is. mix_norm: L2 norm of the input. NaN where a rollout had no thought.
    """
    read = (bag_weights > 0).any(-1)  # the last token of a row has no bag
    count = read.sum()
    ratio, norm = trace.unbind(-1)
    hidden = (1.0 - ratio.square()).clamp_min(0.0).sqrt()
    means = {
        "embeds_ratio": ratio,
        "hidden_ratio": hidden,
        "mix_norm": norm,
    }
    return {name: torch.where(read, value, 0.0).sum() / count for name, value in means.items()}
