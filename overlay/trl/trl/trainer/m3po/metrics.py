# SPDX-License-Identifier: Apache-2.0
"""The numbers under `m3po/` in a run's log: what each of them is."""

from __future__ import annotations

from typing import NamedTuple


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
