# SPDX-License-Identifier: Apache-2.0
"""The figures of a study, each as PNG and SVG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import t

from m3po_lab.core.inference import LEVEL
from m3po_lab.study.analysis import Analysis, Comparison
from m3po_lab.study.measures import by_seed

ATTENTION = ("attention_entropy", "attention_max", "blend_kl", "peer_differs")
COLOURS = {"control": "#222222", "gate": "#1f6fb4", "placebo": "#c8641e", "other": "#7a7a7a"}


def draw_all(analysis: Analysis, comparisons: Sequence[Comparison], folder: Path) -> dict[str, Path]:
    """Draws the figures for which there are runs; their SVG files by name."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "levels": draw_levels(analysis),
        "differences": draw_differences(analysis, comparisons),
        "curves": draw_curves(analysis),
        "attention": draw_attention(analysis),
        "dose": draw_dose(analysis),
    }
    files = {}
    for name, figure in figures.items():
        if figure is not None:
            # Without a date and random ids equal figures are equal files.
            figure.savefig(folder / f"{name}.png", dpi=150, bbox_inches="tight")
            with rc_context({"svg.hashsalt": name}):
                figure.savefig(folder / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
            files[name] = folder / f"{name}.svg"
    return files


def subplots(rows: int = 1, columns: int = 1, *, figsize: tuple[float, float], **options: Any) -> tuple[Figure, Any]:
    """A figure with its axes, as `pyplot` makes them, but of this figure alone."""
    figure = Figure(figsize=figsize)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **options)


def colour(analysis: Analysis, variant: str) -> str:
    """By what the variant is in the study."""
    study = analysis.study
    kinds = {study.control: "control", **dict.fromkeys(study.gates, "gate"), **dict.fromkeys(study.placebos, "placebo")}
    return COLOURS[kinds.get(variant, "other")]


def scaled(analysis: Analysis, values: Sequence[float]) -> np.ndarray:
    """Values of the primary measure as a figure shows them: shares in per cent."""
    return np.array(values) * (100 if analysis.primary.percent else 1)


def unit(analysis: Analysis) -> str:
    """The primary measure with its unit."""
    return f"{analysis.primary.label}{', %' if analysis.primary.percent else ''}"


def draw_levels(analysis: Analysis) -> Any:
    """The primary measure of every run, with the mean of each variant."""
    names = analysis.variants
    figure, axes = subplots(figsize=(7, 0.35 * len(names) + 1.2))
    for row, name in enumerate(names):
        values = scaled(analysis, list(analysis.values(name, analysis.primary).values()))
        axes.plot(values, np.full(len(values), row), "o", color=colour(analysis, name), alpha=0.5)
        axes.plot([values.mean()], [row], "|", color=colour(analysis, name), markersize=18, markeredgewidth=2.5)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(f"{unit(analysis)}: one point a run, a line at their mean")
    axes.grid(axis="x", alpha=0.3)
    return figure


def draw_differences(analysis: Analysis, comparisons: Sequence[Comparison]) -> Any:
    """A forest plot of all differences, with the equivalence margin."""
    if not comparisons:
        return None
    figure, axes = subplots(figsize=(7, 0.2 * len(comparisons) + 1.4))
    margin = scaled(analysis, [analysis.study.margin])[0]
    axes.axvspan(-margin, margin, color="#1f6fb4", alpha=0.08, lw=0)
    axes.axvline(0, color="#222222", lw=0.8)
    for row, comparison in enumerate(comparisons):
        low, high = scaled(analysis, comparison.difference.interval())
        shade = {"not decided": "#7a7a7a", "equivalent": "#1f6fb4"}.get(comparison.verdict, "#c8641e")
        axes.plot([low, high], [row, row], color=shade, lw=1.5)
        axes.plot(scaled(analysis, [comparison.difference.estimate]), [row], "s", color=shade, markersize=3.5)
    axes.set_yticks(range(len(comparisons)), [f"{one.one} - {one.other}" for one in comparisons], fontsize=7)
    axes.set_ylim(len(comparisons) - 0.3, -0.7)
    points = ", points" if analysis.primary.percent else ""
    axes.set_xlabel(f"difference in {analysis.primary.label}{points}: 95 % intervals, the margin shaded")
    axes.grid(axis="x", alpha=0.3)
    return figure


def draw_curves(analysis: Analysis) -> Any:
    """The accuracy of the rollouts over the steps, the mean over the seeds with its 95 % band, against the control."""
    names = [name for name in analysis.variants if name != analysis.study.control]
    columns = 3
    rows = -(-len(names) // columns)
    figure, grid = subplots(rows, columns, figsize=(9, 2.1 * rows), sharex=True, sharey=True, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        for variant in dict.fromkeys((analysis.study.control, name)):
            curves = [run["history"]["accuracy"] for run in by_seed(analysis.runs, variant).values()]
            if not curves or len({len(curve) for curve in curves}) > 1:
                continue
            heights = 100 * np.array(curves)
            steps, mean = np.arange(1, heights.shape[1] + 1), heights.mean(0)
            axes.plot(steps, mean, color=colour(analysis, variant), label=variant)
            if len(curves) > 1:
                half = t.ppf(1 - LEVEL / 2, len(curves) - 1) * heights.std(0, ddof=1) / np.sqrt(len(curves))
                axes.fill_between(steps, mean - half, mean + half, color=colour(analysis, variant), alpha=0.15, lw=0)
        axes.legend(fontsize=7, loc="upper left")
        axes.grid(alpha=0.3)
    for axes in grid.flat[len(names) :]:
        axes.set_axis_off()
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("accuracy of the rollouts, %", fontsize=9)
    figure.tight_layout()
    return figure


def draw_attention(analysis: Analysis) -> Any:
    """The statistics of attention and blend by variant, one point a run."""
    shown = [name for name in analysis.variants if analysis.values(name, analysis.measures[ATTENTION[0]])]
    if not shown:
        return None
    figure, grid = subplots(1, len(ATTENTION), figsize=(11, 0.3 * len(shown) + 1.3), sharey=True)
    for axes, key in zip(grid, ATTENTION, strict=True):
        measure = analysis.measures[key]
        for row, name in enumerate(shown):
            values = np.array(list(analysis.values(name, measure).values()))
            axes.plot(values, np.full(len(values), row), "o", color=colour(analysis, name), alpha=0.6, markersize=4)
        axes.set_xlabel(measure.label, fontsize=8)
        axes.grid(axis="x", alpha=0.3)
    grid[0].set_yticks(range(len(shown)), shown)
    grid[0].invert_yaxis()
    figure.tight_layout()
    return figure


def draw_dose(analysis: Analysis) -> Any:
    """The primary measure over λ, for the gating functions of which there are several λ; the control is at 0."""
    doses: dict[str, dict[float, str]] = {}
    for name in analysis.variants:
        flags = next(iter(by_seed(analysis.runs, name).values()))["flags"]
        if "cross_path_lambda" in flags:
            doses.setdefault(flags["gating_type"], {})[flags["cross_path_lambda"]] = name
    doses = {gate: of for gate, of in doses.items() if len(of) > 1}
    if not doses:
        return None
    figure, axes = subplots(figsize=(5.5, 3.2))
    for gate, of in doses.items():
        if analysis.study.control in analysis.variants:
            of = {0.0: analysis.study.control, **of}
        values = [scaled(analysis, list(analysis.values(of[dose], analysis.primary).values())) for dose in sorted(of)]
        means = [one.mean() for one in values]
        halves = [
            t.ppf(1 - LEVEL / 2, len(one) - 1) * one.std(ddof=1) / np.sqrt(len(one)) if len(one) > 1 else 0.0
            for one in values
        ]
        axes.errorbar(sorted(of), means, yerr=halves, marker="o", capsize=3, label=gate, alpha=0.8)
    axes.set_xlabel("λ (0: the control)")
    axes.set_ylabel(unit(analysis))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure
