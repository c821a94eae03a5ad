# SPDX-License-Identifier: Apache-2.0
"""What the paths did, in numbers: computed on the device, once per rollout, from what the rollout recorded.

In mode m3po the attention statistics come from the recorded bags, whose first entry is the path itself and whose other
entries are λ A_ij of its peers: A is read back from them. Only the similarity, which no record holds, is summed up step
by step.
"""

from __future__ import annotations

import torch

from ..thinking.bags import Peers
from ..thinking.interaction import Attention, PathGroups


class AttentionSums:
    """What no record holds, summed up step by step; device scalars.

    Attributes:
        total, count, smallest, largest: of the similarity, over the pairs that may exchange.
        cut, listening: the weight of the peers that `cross_path_top_k` left out, over the paths that have a peer.
        temperature, groups: log T, over the groups in which paths exchange.
        cuts, matches: whether peers were left out and T was matched at all, known on the host.
    """

    def __init__(self, device: torch.device):
        self.total, self.count, self.cut, self.listening, self.temperature, self.groups = torch.zeros(6, device=device)
        self.smallest = torch.full((), torch.inf, device=device)
        self.largest = torch.full((), -torch.inf, device=device)
        self.cuts = self.matches = False

    def add(self, attention: Attention, peers: Peers) -> None:
        """One step."""
        pairs, similarity = attention.pairs, attention.similarity
        self.total += torch.where(pairs, similarity, 0.0).sum()
        self.count += pairs.sum()
        self.smallest = torch.minimum(self.smallest, torch.where(pairs, similarity, torch.inf).amin())
        self.largest = torch.maximum(self.largest, torch.where(pairs, similarity, -torch.inf).amax())
        if peers.weights.shape[-1] < pairs.shape[-1] - 1:
            self.cuts = True
            self.cut += peers.cut.sum()
            self.listening += (peers.weights > 0).any(-1).sum()
        if isinstance(attention.temperature, torch.Tensor):
            self.matches = True
            exchange = pairs.any(-1).any(-1)
            self.temperature += torch.where(exchange, attention.temperature.flatten().log(), 0.0).sum()
            self.groups += exchange.sum()

    def statistics(self) -> dict[str, torch.Tensor]:
        """See `attention_statistics`."""
        means = {
            "similarity_mean": self.total / self.count,
            "similarity_min": torch.where(self.count > 0, self.smallest, torch.nan),
            "similarity_max": torch.where(self.count > 0, self.largest, torch.nan),
        }
        if self.cuts:
            means["attention_cut"] = self.cut / self.listening
        if self.matches:
            means["matched_temperature"] = (self.temperature / self.groups).exp()
        return means


def attention_statistics(
    peers: torch.Tensor, thinking_mask: torch.Tensor, groups: PathGroups, sums: AttentionSums
) -> dict[str, torch.Tensor]:
    """Means over the blended positions of a rollout; every value is a 0-dim float32 tensor on the device.

    Args:
        peers: (B, T, P) float32, A of a path's peers or λ A, zero where it listened to nobody.
        thinking_mask: (B, T) bool.
        groups: the groups of the rows.
        sums: what was summed up in the rollout.

    Returns:
        attention_entropy: entropy of A over the peers, in nats. attention_max: the largest weight of A.
        attention_variance: variance of A over the active peers. active_paths: thinking paths of a group, over the
        groups and steps with at least one. similarity_mean, similarity_min, similarity_max: over the pairs that could
        exchange. attention_cut: weight of the peers that `cross_path_top_k` left out, before A was scaled to sum to 1
        again; only if it left some out. matched_temperature: T, geometric mean over groups and steps; only if it was
        matched. NaN
        where a rollout blended nothing.
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
        **sums.statistics(),
    }


def residual_statistics(trace: torch.Tensor, bag_weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the residual gate did, means over the thinking inputs that were read; 0-dim float32 tensors on the device.

    Args:
        trace: (B, T, 2) float32, see `mix_bags`.
        bag_weights: (B, T, K) float32, zero where there was no thought.

    Returns:
        embeds_ratio: the residual gate's a, mean over H. hidden_ratio: sqrt(1 - embeds_ratio²) of each position, HRPO's
        measure of how much thought there is. mix_norm: L2 norm of the input. NaN where a rollout had no thought.
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
