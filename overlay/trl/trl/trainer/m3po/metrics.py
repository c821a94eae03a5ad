# SPDX-License-Identifier: Apache-2.0
"""The numbers under `m3po/` in a run's log: what each of them is, and the one place from which they are logged."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers.m3po.thinking.record import RolloutRecord


class Metric(NamedTuple):
    """A logged number: in which modes, in which unit, and what it is, as Markdown."""

    modes: str
    unit: str
    definition: str


_CROSS, _RESIDUAL, _ASLR = "m3po, h3po", "hrpo, h3po", "any, with ASLR"
_LEARNS = "m3po, h3po with a learnable gating function"
_DISTANCE = (
    "how far the module's parameters are from those the run started with: L2 norm of the difference, before this "
    "optimizer step; 0 in the first. Not logged where processes share the parameters (FSDP2, ZeRO-3)"
)
_GRADIENT = "L2 norm of the module's gradient in this optimizer step, before clipping"
_SIMILARITY = "similarity S over the pairs that could exchange, of a rollout, averaged over processes and rollouts"
_EFFECT = "KL divergence of the distribution of the next token, at the sampling temperature, from that of the model"
_SPREAD = "RMS distance of the latent paths of a position from their mean"

METRICS: dict[str, Metric] = {
    "rollout_logp_diff": Metric(
        "all",
        "nats",
        "mean over the scored tokens of the absolute difference between a token's log-prob in the rollout and in the "
        "policy pass, taken only while both have the same weights. Rounding is all that should be left. If it jumps, "
        "the policy pass does not see what the rollout saw",
    ),
    "rollout_logp_diff_max": Metric("all", "nats", "the largest such difference since the last log line"),
    "distinct_answers": Metric(
        "all",
        "answers",
        "different texts behind the first answer marker among the paths of a group, mean over the groups; paths "
        "without a marker, or cut by `mask_truncated_completions`, count nothing. 1 means that the group agrees, N "
        "that no two paths do. Phase isolation should keep it up",
    ),
    "thinking_fraction": Metric(
        "all but none",
        "fraction",
        "tokens of the thinking phase over all completion tokens; the token that completes the marker belongs to the "
        "answer",
    ),
    "thinking_length": Metric("all but none", "tokens", "tokens of the thinking phase, mean over the completions"),
    "embeds_ratio": Metric(
        _RESIDUAL,
        "fraction",
        "the residual gate's a, mean over the hidden size, mean over the thinking inputs that were read; 1 would be "
        "the token alone. HRPO's metric of the same name",
    ),
    "hidden_ratio": Metric(
        _RESIDUAL,
        "-",
        "sqrt(1 - ratio²) of each of these positions, mean: how much thought there is, before HRPO's factor i. HRPO's "
        "metric",
    ),
    "mix_norm": Metric(_RESIDUAL, "-", "L2 norm of these inputs, mean"),
    "attention_entropy": Metric(
        _CROSS,
        "nats",
        "entropy of A over the peers of a path, mean over the blended positions; log(number of active peers) when all "
        "weigh the same",
    ),
    "attention_max": Metric(_CROSS, "fraction", "largest weight of A, mean over the blended positions"),
    "attention_variance": Metric(_CROSS, "-", "variance of A over the active peers, mean over the blended positions"),
    "active_paths": Metric(_CROSS, "paths", "thinking paths of a group, mean over groups and steps with at least one"),
    "peer_differs": Metric(
        _CROSS,
        "fraction",
        "thinking positions at which a thinking peer has another token; at the others a blend of tokens changes "
        "nothing",
    ),
    "blend_kl": Metric(
        "m3po",
        "nats",
        f"what the blend does: {_EFFECT} without it, mean over the thinking positions of a group of the rollout; "
        "every `blend_kl_steps` steps. Below 0.001 there is nothing for a gating function to decide",
    ),
    "thought_kl": Metric(
        _RESIDUAL,
        "nats",
        f"what the thoughts do, those of the group included: {_EFFECT} with plain tokens as inputs, as `blend_kl`",
    ),
    "aslr_kl": Metric(
        _ASLR,
        "nats",
        f"what ASLR does: {_EFFECT} without it, mean over the positions of the completions, else as `blend_kl`",
    ),
    "similarity_mean": Metric(_CROSS, "-", f"mean {_SIMILARITY}"),
    "similarity_min": Metric(_CROSS, "-", f"smallest {_SIMILARITY}"),
    "similarity_max": Metric(_CROSS, "-", f"largest {_SIMILARITY}"),
    "attention_cut": Metric(
        f"{_CROSS} with `cross_path_top_k`",
        "fraction",
        "weight of the peers that were left out, before A was scaled to sum to 1 again, mean over the blended "
        "positions; absent where it leaves nobody out",
    ),
    "matched_temperature": Metric(
        f"{_CROSS} with `cross_path_temp: match`",
        "-",
        "T of eq. 5, geometric mean over the groups and steps in which paths exchange; absent with the baseline, whose "
        "T stays 0.1",
    ),
    "similarity_error": Metric(
        f"{_CROSS} with `kl_divergence`",
        "-",
        "how far its similarity can be off at most, having been worked out on the likeliest tokens: the largest of the "
        "rollout; absent with `exact: true`",
    ),
    "gating_grad_norm": Metric(_LEARNS, "-", _GRADIENT),
    "gating_distance": Metric(
        _LEARNS,
        "fraction",
        "how far the parameters are from those the run started with: L2 norm of the difference over that of the start, "
        "before this optimizer step; 0 in the first",
    ),
    "router_weight_mean": Metric(
        _ASLR,
        "fraction",
        "the router's score g at the states that completion tokens were sampled from, mean; 0.5 at the start",
    ),
    "activation_rate_actual": Metric(
        _ASLR,
        "fraction",
        "these positions with g above `aslr_threshold`. The router is soft, so a position below it is refined too, "
        "only less; 0 in the first step, where every score is 0.5",
    ),
    "latent_diversity_before": Metric(
        _ASLR,
        "RMS of the state",
        f"{_SPREAD}, after expansion, mean over these positions: 0.1 `aslr_gumbel_temp` sqrt(1 - 1/P)",
    ),
    "latent_diversity_after": Metric(_ASLR, "RMS of the state", f"{_SPREAD}, after the last round, mean"),
    "aggregator_weight_entropy": Metric(
        _ASLR,
        "nats",
        "entropy of the path aggregator's weights, softmax(a); log P when all weigh the same, as at the start",
    ),
    "router_distance": Metric(_ASLR, "-", _DISTANCE),
    "path_collaborator_distance": Metric(_ASLR, "-", _DISTANCE),
    "path_aggregator_distance": Metric(_ASLR, "-", _DISTANCE),
    "router_grad_norm": Metric(_ASLR, "-", f"{_GRADIENT}; 0 in the first step. Not logged under ZeRO-3"),
    "path_collaborator_grad_norm": Metric(_ASLR, "-", f"{_GRADIENT}; 0 in the first step. Not logged under ZeRO-3"),
    "path_aggregator_grad_norm": Metric(_ASLR, "-", f"{_GRADIENT}. Not logged under ZeRO-3"),
}


class MetricsLog:
    """Writes into the trainer's metrics, over all processes.

    Args:
        trainer: the `GRPOTrainer`.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer

    @property
    def _values(self) -> dict[str, list[float]]:
        return self._trainer._metrics["train" if self._trainer.model.training else "eval"]

    def log(self, name: str, value: torch.Tensor) -> None:
        """Mean over the processes that have the number; nothing is logged where none has it.

        Raises:
            KeyError: `METRICS` does not say what the number is.
        """
        METRICS[name]
        mean = self._trainer.accelerator.gather(value.float().reshape(1)).nanmean().item()
        if mean == mean:
            self._values[f"m3po/{name}"].append(mean)

    def log_rollout_diff(self, recorded: torch.Tensor, logps: torch.Tensor, mask: torch.Tensor) -> None:
        """Logs how far the policy pass is from the rollout.

        Args:
            recorded, logps: (B, C) float, log-probs of the rollout and of the policy pass with the same weights.
            mask: (B, C), the tokens that count.
        """
        difference = (logps.detach() - recorded).abs() * mask
        gather = self._trainer.accelerator.gather
        total = gather(torch.stack([difference.sum(), mask.sum()]).float().unsqueeze(0)).sum(0)
        values = self._values
        values["m3po/rollout_logp_diff"].append((total[0] / total[1].clamp_min(1)).item())
        # TRL averages what is logged between two log lines; the largest value must stay the largest.
        largest = gather(difference.max()).max().item()
        values["m3po/rollout_logp_diff_max"] = [max([largest, *values["m3po/rollout_logp_diff_max"]])]

    def log_rollout(
        self, record: RolloutRecord, statistics: dict[str, torch.Tensor], completion_mask: torch.Tensor
    ) -> None:
        """Logs the statistics of a rollout, and how long it thought.

        Args:
            record: of C positions.
            statistics: 0-dim tensors by name.
            completion_mask: (B, C), the tokens of the completions.
        """
        for name, value in statistics.items():
            self.log(name, value)
        if record.thinking_mask is None:
            return
        tokens = completion_mask.bool()
        thinking = record.thinking_mask & tokens
        self.log("thinking_fraction", thinking.sum() / tokens.sum())
        self.log("thinking_length", thinking.sum(1).float().mean())


def distinct_answers(texts: list[str], marker: str, group_ids: list[int]) -> float:
    """Number of different texts behind the first marker in a group, mean over the groups.

    Args:
        texts: one completion a row.
        marker: the answer marker.
        group_ids: the group of each row.
    """
    answers: dict[int, set[str]] = {}
    for group, text in zip(group_ids, texts, strict=True):
        _, behind, answer = text.partition(marker)
        answers.setdefault(group, set()).update([answer.strip()] if behind else [])
    return sum(len(distinct) for distinct in answers.values()) / len(answers)
