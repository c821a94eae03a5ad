# SPDX-License-Identifier: Apache-2.0
"""The comparison of pretraining runs with and without hyper-connections: `report.md`, `curves.png`, `routing.png`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import t as student

from m3po_lab.core.errors import UserError
from m3po_lab.core.files import read_json, write_text
from m3po_lab.core.identity import difference
from m3po_lab.pretraining.measures import summary

COLOURS = {"baseline": "#8c8c8c", "mhc": "#1f77b4"}
CURVES = {"curve": "bits per byte, validation", "loss_curve": "training loss, nats per token"}
COLUMNS = (
    "seed",
    "row error of H_res",
    "column error",
    "from its start",
    "from identity",
    "stream cosine",
    "composite gain",
    "gate effect, nats",
)
PAPER = "the paper has 6.7 % more time a step, with fused kernels on a 27B model"


def load_results(folders: Sequence[Path]) -> dict[str, dict[int, dict[str, Any]]]:
    """The results by variant and seed.

    Raises:
        UserError: one is missing, or the runs differ in more than `mhc_enabled` and the seed.
    """
    results: dict[str, dict[int, dict[str, Any]]] = {"baseline": {}, "mhc": {}}
    for folder in folders:
        result = read_json(folder / "result.json")
        if result is None:
            raise UserError(f"{folder} has no result.json: give the folders of finished runs.")
        results[result["variant"]][result["seed"]] = result
    runs = [run for by_seed in results.values() for run in by_seed.values()]
    for run in runs[1:]:
        differing = difference(flags_of(runs[0]), flags_of(run), ("mhc_enabled", "seed"))
        if differing:
            raise UserError(
                f"the runs differ in {differing[0]} ({differing[1]}, {differing[2]}): only runs that differ in "
                "mhc_enabled and seed can be compared."
            )
    return results


def flags_of(result: dict[str, Any]) -> dict[str, Any]:
    """The flags of a finished run, as far as its result has them."""
    flags = result.get("flags") or {**result["script"], "max_steps": result["max_steps"]}
    return {**flags, "tokens_per_step": result["tokens_per_step"]}


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of a mean by Student's t; None of fewer than two values."""
    if len(values) < 2:
        return None
    half = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def spread_of_starts(runs: Iterable[dict[str, Any]]) -> float:
    """The largest distance, in Frobenius norm, of one sublayer's H_res in one run from that in another, untrained."""
    stacked = [np.array(list(run["first_matrices"].values())) for run in runs]  # (2L, S, S) each
    return max(float(np.linalg.norm(one - other, axis=(1, 2)).max()) for one in stacked for other in stacked)


def text_of(results: dict[str, dict[int, dict[str, Any]]]) -> str:
    """The tables, as Markdown."""
    seeds = sorted(set(results["baseline"]) & set(results["mhc"]))
    first = results["mhc"][seeds[0]]
    lines = [
        "| seed | baseline, bits per byte | mHC | difference | tokens/s over baseline | peak memory over baseline |",
        "|---|---|---|---|---|---|",
    ]
    differences = []
    for seed in seeds:
        plain, own = results["baseline"][seed], results["mhc"][seed]
        differences.append(own["bits_per_byte"] - plain["bits_per_byte"])
        lines.append(
            f"| {seed} | {plain['bits_per_byte']:.4f} | {own['bits_per_byte']:.4f} | {differences[-1]:+.4f} | "
            f"{own['tokens_per_second'] / plain['tokens_per_second']:.2f} | "
            f"{own['peak_bytes'] / plain['peak_bytes']:.2f} |"
        )
    bounds = interval(differences)
    if bounds is None:
        verdict = "One pair cannot tell a difference from chance: give --seeds 0 1 2."
    else:
        shown_interval = f"{bounds[0]:+.4f} to {bounds[1]:+.4f}"
        what = "no difference is shown" if bounds[0] <= 0 <= bounds[1] else "mHC and baseline differ"
        verdict = f"Mean difference {fmean(differences):+.4f} bits per byte, 95 % interval {shown_interval}: {what}."
    more = first["mhc_parameters"]
    lines += [
        "",
        f"{verdict} mHC adds {more} parameters to {first['parameters'] - more} "
        f"({more / (first['parameters'] - more):.1%}). {first['max_steps']} steps of {first['tokens_per_step']} "
        f"tokens; times are medians of the steps; {PAPER}.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for seed in seeds:
        one = summary(results["mhc"][seed]["report"])
        lines.append(
            f"| {seed} | {one['row_error']:.1e} | {one['column_error']:.1e} | {one['from_start']:.3f} | "
            f"{one['from_identity']:.3f} | {one['stream_cosine']:.3f} | {one['composite_gain']:.3f} | "
            f"{one['gate_effect']:.2e} |"
        )
    moved = min(summary(results["mhc"][seed]["report"])["from_start"] for seed in seeds)
    apart = f"; the starts of two seeds are at most {spread_of_starts(results['mhc'].values()):.1e} apart"
    sentence = f"H_res (Frobenius norm, mean over sublayers and positions) is at least {moved:.3f} from its start"
    lines += ["", f"{sentence}{apart * (len(seeds) > 1)}."]
    warnings = [f"Seed {seed}: {line}" for seed in seeds for line in results["mhc"][seed]["report"]["verdicts"]]
    if warnings:
        lines += ["", *(f"**{line}**" for line in warnings)]
    return "\n".join(lines)


def draw_curves(results: dict[str, dict[int, dict[str, Any]]], file: Path) -> None:
    """Bits per byte in validation and the training loss over the steps, a line for each run in each.

    The second one is left out where a result has no training losses.
    """
    runs = [run for by_seed in results.values() for run in by_seed.values()]
    shown = {name: label for name, label in CURVES.items() if all(run.get(name) for run in runs)}
    figure = Figure(figsize=(6.5 * len(shown) + 1.5, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, label) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        for variant, by_seed in results.items():
            for index, run in enumerate(by_seed.values()):
                steps, values = zip(*run[name], strict=True)
                axes.plot(steps, values, color=COLOURS[variant], linewidth=1.5, label=variant if index == 0 else None)
        axes.set(xlabel="optimizer step", ylabel=label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False)
    first = next(iter(results["mhc"].values()))
    figure.suptitle(f"{first['script']['dataset']}, {len(results['mhc'])} seed(s)", fontsize=11)
    figure.savefig(file)


def draw_routing(matrices: Mapping[str, Sequence[Sequence[float]]], title: str, file: Path) -> None:
    """H_res of each sublayer, mean over positions: rows are the streams that are read, columns those written."""
    layers = len(matrices) // 2
    figure = Figure(figsize=(1.6 * layers + 1.4, 3.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, layers, squeeze=False)
    for name, matrix in matrices.items():
        layer, half = name.split(".")
        axes = grid[0 if half == "attn" else 1][int(layer)]
        shown = axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"layer {layer}, {half}", fontsize=8)
    figure.colorbar(shown, ax=grid.ravel().tolist(), shrink=0.8, label="weight")
    figure.suptitle(title, fontsize=10)
    figure.savefig(file)


def write_report(folders: Sequence[Path], folder: Path) -> str:
    """Writes the three files into `folder`; returns the text.

    Raises:
        UserError: see `load_results`.
    """
    results = load_results(folders)
    text = text_of(results)
    write_text(folder / "report.md", text + "\n")
    draw_curves(results, folder / "curves.png")
    first = results["mhc"][min(results["mhc"])]
    title = f"H_res after {first['max_steps']} steps, seed {first['seed']}"
    draw_routing(first["matrices"], title, folder / "routing.png")
    return text
