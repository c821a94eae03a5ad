# SPDX-License-Identifier: Apache-2.0
"""What ASLR did in an evaluation: its router and its latent paths, means over all tokens that were decoded."""

from collections.abc import Sequence

from transformers.m3po import M3POGenerationState

TOKENS = "tokens"


def router_of_batch(state: M3POGenerationState | None) -> dict[str, float]:
    """The statistics of a rollout by name (`LatentRollout.end`) and the number of its tokens; {} without ASLR."""
    if state is None or "router_weight_mean" not in state.statistics:
        return {}
    names = [name for name in state.statistics if name.startswith(("router", "activation", "latent"))]
    return {TOKENS: int((state.rollout_logps != 0).sum()), **{name: float(state.statistics[name]) for name in names}}


def router_statistics(batches: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the tokens of batches, and their number; {} where ASLR ran in none."""
    known = [batch for batch in batches if batch]
    tokens = sum(batch[TOKENS] for batch in known)
    if not tokens:
        return {}
    names = [name for name in known[0] if name != TOKENS]
    return {TOKENS: tokens, **{name: sum(batch[TOKENS] * batch[name] for batch in known) / tokens for name in names}}


def router_line(label: str, statistics: dict[str, float]) -> str:
    """The statistics in a line."""
    before, after = statistics["latent_diversity_before"], statistics["latent_diversity_after"]
    return (
        f"ASLR {label}: the router activates {statistics['activation_rate_actual']:.1%} of {statistics[TOKENS]} "
        f"tokens, mean score {statistics['router_weight_mean']:.4f}; latent paths {before:.4f} apart before the "
        f"rounds, {after:.4f} after"
    )
