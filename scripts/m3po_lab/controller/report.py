# SPDX-License-Identifier: Apache-2.0
"""The report of a controller's training: `report.md` with tables and four figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from m3po_lab.controller.arguments import ControllerRun
from m3po_lab.controller.comparison import DEFAULT, IDENTITY, MEASURES, Compared, ceiling, compare
from m3po_lab.controller.effects import accuracy
from m3po_lab.controller.figures import FIGURES, draw_all
from m3po_lab.controller.fits import PPO
from m3po_lab.controller.policy import CONSTANT
from m3po_lab.core.files import write_text
from m3po_lab.core.inference import LEVEL
from m3po_lab.core.stats import proportion_interval
from m3po_lab.study.report import table

UNITS = {"dense": (1.0, 4, ""), "correct": (100.0, 1, " points")}  # factor, digits, unit of a difference


def effect_table(effects: Mapping[str, Any]) -> str:
    """What each gate of the grid is worth on the test split when it is set alike for all problems and layers."""
    rows = []
    for row in effects["grid"]:
        right, number = sum(row["correct"]), len(row["correct"])
        low, high = proportion_interval(right, number)
        rows.append(
            [
                f"{row['gate']:.2f}",
                f"{row['divergence']:.2e}",
                f"{np.mean(row['dense']):+.4f}",
                f"{100 * right / number:.1f} ({100 * low:.1f} to {100 * high:.1f})",
            ]
        )
    head = ["gate", "KL from gate 1, nats", "log-prob over gate 1, nats a token", "accuracy, % (95 % interval)"]
    return table(head, rows)


def shown(measure: str, value: float, sign: bool = False) -> str:
    """A value of a measure, or with a sign a difference."""
    factor, digits, _ = UNITS[measure]
    return f"{factor * value:{'+' if sign or measure == 'dense' else ''}.{digits}f}"


def level_table(levels: Mapping[str, Mapping[str, Any]], effects: Mapping[str, Any]) -> str:
    """Fits as rows: the mean over seeds and problems of each measure, with its range over the seeds."""
    names = list(next(iter(levels.values())))
    rows = []
    for name in names:
        cells = [name]
        for measure, values in levels.items():
            by_seed = values[name].mean(1)
            spread = f" ({shown(measure, by_seed.min())} to {shown(measure, by_seed.max())})" if np.ptp(by_seed) else ""
            cells.append(shown(measure, by_seed.mean()) + spread)
        rows.append(cells)
    rows.append(["oracle on the grid", *(shown(measure, ceiling(effects, measure).mean()) for measure in levels)])
    return table(["", MEASURES["dense"], "accuracy, %"], rows)


def difference_table(measure: str, compared: Sequence[Compared]) -> str:
    """The differences of a measure with their intervals."""
    rows = []
    for one in compared:
        low, high = (shown(measure, end, sign=True) for end in one.difference.interval())
        estimate = shown(measure, one.difference.estimate, sign=True)
        rows.append([one.one, one.other, f"{estimate} ({low} to {high})", f"{one.p_holm:.2g}"])
    unit = "points" if measure == "correct" else "nats a token"
    return table(["", "against", f"difference, {unit} (95 % interval)", "p, Holm"], rows)


def answer_lines(effects: Mapping[str, Any], compared: Mapping[str, Sequence[Compared]]) -> list[str]:
    """What it shows, in sentences."""
    grid = effects["grid"]
    best = max(grid, key=lambda row: np.mean(row["dense"]))
    alike = (
        f"no gate that is the same everywhere is worth more than gate 1 (accuracy {accuracy(grid[-1]):.1%})."
        if best is grid[-1]
        else f"the best gate that is the same everywhere is {best['gate']:.2f}: {np.mean(best['dense']):+.4f} nats a "
        f"token over gate 1, accuracy {accuracy(best):.1%} against {accuracy(grid[-1]):.1%}."
    )
    lines = [
        f"Between gates 0 and 1 the next token moves by {effects['preflight']:.2e} nats. On the test problems {alike}"
    ]
    for measure, found in compared.items():
        for one in found:
            if one.one.startswith(PPO) and (one.other == DEFAULT or one.other.startswith(CONSTANT)):
                gap = one.difference.estimate
                word = "differs from" if one.p_holm < LEVEL else "is not shown to differ from"
                low, high = (shown(measure, end, sign=True) for end in one.difference.interval())
                lines.append(
                    f"{MEASURES[measure].capitalize().split(',')[0]}: {one.one} {word} {one.other}: "
                    f"{shown(measure, gap, sign=True)} ({low} to {high}){UNITS[measure][2]}."
                )
    if not any(compared.values()):
        lines.append("One seed shows no difference: give several, e.g. --seeds 0 1 2 3 4.")
    return lines


def write_report(
    run: ControllerRun, effects: Mapping[str, Any], results: Sequence[Mapping[str, Any]], digest: str
) -> str:
    """Writes report and figures into the folder; returns the lines that answer the question.

    Args:
        run: what was done.
        effects: of `effects.json`.
        results: one for each kind of gates and seed.
        digest: of the model's weights, the same before and after.
    """
    both = {measure: compare(effects, results, measure) for measure in MEASURES}
    compared = {measure: found for measure, (_, found) in both.items()}
    answer = answer_lines(effects, compared)
    draw_all(effects, results, run.script.reward, run.folder)
    spent = [fit["spent"] for result in results for fit in result["fits"].values()]
    number = len(effects["grid"][0]["correct"])
    parts = [
        "# A controller of the routing gate",
        "\n\n".join(answer),
        "## What a gate is worth that is the same for all problems",
        effect_table(effects),
        "## What the fits are worth",
        f"On {number} test problems, means over seeds {', '.join(map(str, run.script.seeds))}; in brackets the range "
        f"of the seeds. Each fit evaluated at most {run.script.budget} pairs of problem and gate (at most "
        f"{max(spent)} were used). {IDENTITY} and {DEFAULT} are not fitted; the oracle sees the test problems' own "
        "results and is a ceiling for gates that are the same in all layers.",
        level_table({measure: values for measure, (values, _) in both.items()}, effects),
        *(
            part
            for measure, found in compared.items()
            if found
            for part in (f"## Differences in {MEASURES[measure].split(',')[0]}", difference_table(measure, found))
        ),
        "## Figures",
        *(f"![{caption}]({name}.png)\n\n*{caption}*" for name, caption in FIGURES.items()),
        f"Reward: {run.script.reward}. The model's weights did not change (sha256 {digest}).",
    ]
    write_text(run.folder / "report.md", "\n\n".join(parts) + "\n")
    return "\n".join(answer)
