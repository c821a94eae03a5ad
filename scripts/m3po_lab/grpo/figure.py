# SPDX-License-Identifier: Apache-2.0
"""The reward curve of a run as a PNG: every step faint, a running mean on top, held-out accuracy before and after."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

CURVES = {
    "rewards/correct_reward/mean": ("correct, sampled", "#1f77b4"),
    "rewards/format_reward/mean": ("format, sampled", "#8c8c8c"),
}


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and its neighbours, `window` of them in all and fewer at the ends."""
    half = window // 2
    parts = [values[max(0, at - half) : at + half + 1] for at in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def draw_rewards(history: Sequence[dict[str, Any]], summary: dict[str, Any], file: Path) -> None:
    """Draw the logged rewards of a run (the trainer's `log_history`) and its greedy accuracy into `file`."""
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, (label, colour) in CURVES.items():
        points = [(row["step"], row[key]) for row in history if key in row]
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
            axes.plot(steps, running_mean(values, 5), color=colour, linewidth=2, label=f"{label} (mean of 5 steps)")
    _mark_accuracy(axes, summary)
    axes.set(xlabel="optimizer step", ylabel="share of completions", ylim=(0, 1.04))
    gate = f" ({summary['gating_type']})" if summary["gating_type"] not in (None, "baseline") else ""
    aslr = " with ASLR" if summary["aslr_enabled"] else ""
    axes.set_title(
        f"{summary['dataset']}, mode {summary['mode']}{gate}{aslr}, seed {summary['seed']}", fontsize=11, loc="left"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(file)


def _mark_accuracy(axes: Axes, summary: dict[str, Any]) -> None:
    """The greedy accuracy at the first and at the last step."""
    ends = (0, summary["steps"])
    shares = (summary["accuracy_before"], summary["accuracy_after"])
    axes.plot(
        ends,
        shares,
        color="#d62728",
        linestyle=":",
        marker="o",
        label=f"greedy, {summary['num_eval_problems']} held-out",
    )
    for step, share, side in zip(ends, shares, ("left", "right"), strict=True):
        axes.annotate(
            f"{share:.1%}", (step, share), (0, 9), textcoords="offset points", ha=side, color="#d62728", weight="bold"
        )
