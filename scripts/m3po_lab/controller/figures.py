# SPDX-License-Identifier: Apache-2.0
"""The figures of a controller's training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from m3po_lab.controller.fits import PPO, RANDOM
from m3po_lab.core.stats import proportion_interval
from m3po_lab.pretraining.report import draw_routing

FIGURES = {
    "gates": "The gates that the policy chooses on the test problems, all seeds, by layer.",
    "gate_accuracy": "Accuracy over the gate of one layer, the others at 1, with 95 % intervals; the line is the gate "
    "set alike in all layers.",
    "routing": "H_res on the test problems under gate 1, mean over positions.",
    "learning": "The policy's reward on the test problems over the pairs that it has evaluated, each seed and their "
    "mean; dashed: what the other fits reach with the whole budget.",
}


def draw_all(effects: Mapping[str, Any], results: Sequence[Mapping[str, Any]], reward: str, folder: Path) -> None:
    """Draws all of `FIGURES` as PNG."""
    draw_gates(results, folder / "gates.png")
    draw_gate_accuracy(effects, folder / "gate_accuracy.png")
    draw_routing(effects["matrices"], "H_res under gate 1, on the test problems", folder / "routing.png")
    draw_learning(effects, results, reward, folder / "learning.png")


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _by_kind(results: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        kinds.setdefault(result["gates"], []).append(result)
    return kinds


def draw_gates(results: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Histograms of the chosen gates; the columns are the gates of a kind."""
    kinds = _by_kind(results)
    chosen = {kind: np.array([one["fits"][PPO]["gates"] for one in of]) for kind, of in kinds.items()}  # (S, P, d)
    most = max(values.shape[2] for values in chosen.values())
    figure = _figure(1.9 * most + 1.5, 1.7 * len(chosen) + 0.6)
    grid = figure.subplots(len(chosen), most, squeeze=False, sharex=True, sharey=True)
    edges = np.linspace(0, 1, 21)
    for row, (kind, values) in zip(grid, chosen.items(), strict=True):
        for place, axes in enumerate(row):
            if place >= values.shape[2]:
                axes.set_axis_off()
                continue
            for seed in values[:, :, place]:
                axes.hist(seed, edges, weights=np.full(len(seed), 1 / len(seed)), histtype="step", alpha=0.8)
            axes.set_title(gate_label(kind, place), fontsize=8)
            axes.grid(alpha=0.25)
    figure.supxlabel("gate", fontsize=9)
    figure.supylabel("share of the test problems, a line a seed", fontsize=9)
    figure.savefig(file)


def gate_label(kind: str, place: int) -> str:
    """The name of one of the gates of a kind."""
    if kind == "global":
        return "all layers"
    if kind == "layer":
        return f"layer {place}"
    return f"layer {place // 2}, {('attn', 'mlp')[place % 2]}"


def draw_gate_accuracy(effects: Mapping[str, Any], file: Path) -> None:
    """A panel a layer: points with intervals, and the line of a gate for all layers."""
    layers = sorted({row["layer"] for row in effects["layers"]})
    figure = _figure(2.2 * len(layers) + 1, 2.9)
    panels = figure.subplots(1, len(layers), squeeze=False, sharey=True)[0]
    grid = effects["grid"]
    for layer, axes in zip(layers, panels, strict=True):
        rows = [*(row for row in effects["layers"] if row["layer"] == layer), grid[-1]]
        for row in rows:
            right, number = sum(row["correct"]), len(row["correct"])
            low, high = proportion_interval(right, number)
            share = right / number
            axes.errorbar(
                row["gate"], 100 * share, yerr=[[100 * (share - low)], [100 * (high - share)]], fmt="o", capsize=3,
                color="#1f6fb4", markersize=4,
            )  # fmt: skip
        axes.plot([row["gate"] for row in grid], [100 * np.mean(row["correct"]) for row in grid], color="#999999", lw=1)
        axes.set_title(f"layer {layer}", fontsize=9)
        axes.grid(alpha=0.25)
    figure.supxlabel("gate of this layer", fontsize=9)
    panels[0].set_ylabel("accuracy, %")
    figure.savefig(file)


def draw_learning(effects: Mapping[str, Any], results: Sequence[Mapping[str, Any]], reward: str, file: Path) -> None:
    """A panel a kind: the curves of the seeds with their mean, and the other fits as levels."""
    kinds = _by_kind(results)
    figure = _figure(4.6 * len(kinds) + 0.4, 3.4)
    panels = figure.subplots(1, len(kinds), squeeze=False)[0]
    for axes, (kind, of) in zip(panels, kinds.items(), strict=True):
        curves = [[(row["spent"], row["test"]) for row in one["curve"] if "test" in row] for one in of]
        for curve in curves:
            axes.plot(*zip(*curve, strict=True), color="#1f6fb4", alpha=0.25, lw=1)
        if len({len(curve) for curve in curves}) == 1:
            spent, heights = np.array(curves).mean(0).T
            axes.plot(spent, heights, color="#1f6fb4", lw=2, label=PPO)
        others = [name for name in of[0]["fits"] if name != PPO]
        for shade, name in zip(("#c8641e", "#2a8a57", "#7d4fa3", "#999999"), others, strict=False):
            level = np.mean([reward_of(one["fits"][name], reward) for one in of])
            axes.axhline(level, color=shade, ls=":" if name == RANDOM else "--", lw=1.2, label=name)
        axes.axhline(reward_of(effects["grid"][-1], reward), color="#222222", lw=0.8, label="gate 1")
        axes.set(title=kind, xlabel="pairs evaluated", ylabel=f"reward ({reward})")
        axes.legend(fontsize=7)
        axes.grid(alpha=0.25)
    figure.savefig(file)


def reward_of(fit: Mapping[str, Any], reward: str) -> float:
    """The mean reward of what `worth` found."""
    parts = {"dense": ["dense"], "exact": ["correct"], "mix": ["dense", "correct"]}[reward]
    return float(sum(np.mean(fit[part]) for part in parts))
