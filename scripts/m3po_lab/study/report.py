# SPDX-License-Identifier: Apache-2.0
"""The report of a study: `report.md`, and `report.html`, the same with its figures inside, which needs no network."""

import base64
import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import markdown

from m3po_lab.core.files import shown_path, write_text
from m3po_lab.core.inference import POWER
from m3po_lab.study.analysis import Analysis, Comparison
from m3po_lab.study.figures import draw_all
from m3po_lab.study.measures import Measure

CAPTIONS = {
    "levels": "Every run after training.",
    "differences": "All differences. Grey: not decided; blue: equivalent within the margin; orange: different after "
    "Holm's correction.",
    "curves": "Accuracy of the rollouts over the steps, against the control (black); bands are 95 % intervals of the "
    "mean over the seeds.",
    "attention": "Attention and blend by variant, means over each run.",
    "dose": "Dose and response: the primary measure over λ.",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 13px; margin: 1rem 0; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .6rem; text-align: left; white-space: nowrap; }
td { font-variant-numeric: tabular-nums; }
img { max-width: 100%; }
code { background: #f3f3f3; padding: 0 .2rem; }
"""


def write_report(
    analysis: Analysis, stored: Mapping[str, Any], missing: Sequence[str], source: Path, folder: Path, command: str
) -> list[str]:
    """Writes report and figures; returns the lines that answer the question.

    Args:
        analysis: of the finished runs.
        stored: the content of `study.json`.
        missing: the names of the runs that are not finished.
        source: the folder of the study.
        folder: of the report.
        command: that made it.
    """
    comparisons = analysis.compare()
    answer = answer_lines(analysis, comparisons, missing)
    figures = draw_all(analysis, comparisons, folder / "figures")
    parts = [
        f"# {analysis.study.question}",
        "\n\n".join(answer),
        "## Written down before the runs",
        design_lines(analysis, stored),
        "## Levels",
        level_table(analysis),
        image("levels", figures),
        "## Differences",
        difference_notes(analysis),
        difference_table(analysis, comparisons),
        image("differences", figures),
        "## Convergence",
        image("curves", figures),
        "## Attention and blend",
        image("attention", figures) or "No variant exchanges anything.",
        image("dose", figures),
        "## Other measures, each variant against the control",
        "One comparison at a time, without correction: to look at, not to conclude from.",
        secondary_table(analysis),
        "## Runs",
        run_table(analysis, source, folder),
        "## Not done",
        f"Runs that are missing: {', '.join(missing)}." if missing else "All runs of the plan are in this report.",
        f"Made by `{command}`, from runs of commit {stored['commit']}{' with changes' if stored['dirty'] else ''}, "
        f"study {stored['digest']}.",
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    write_text(folder / "report.md", text)
    write_text(folder / "report.html", as_html(text, figures))
    return answer


def image(name: str, figures: Mapping[str, Path]) -> str:
    """A figure with its caption as Markdown; empty where it was not drawn."""
    return f"![{CAPTIONS[name]}](figures/{name}.svg)\n\n*{CAPTIONS[name]}*" if name in figures else ""


def as_html(text: str, figures: Mapping[str, Path]) -> str:
    """The report as one file: its figures are inside."""
    body = markdown.markdown(html.escape(text, quote=False), extensions=["tables"])
    for name, file in figures.items():
        content = base64.b64encode(file.read_bytes()).decode()
        body = body.replace(f'src="figures/{name}.svg"', f'src="data:image/svg+xml;base64,{content}"')
    title = html.escape(text.partition("\n")[0].removeprefix("# "))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def shown(measure: Measure, value: float | None, sign: bool = False) -> str:
    """A value, or with a sign a difference, of a measure; shares in per cent and points."""
    if value is None:
        return "-"
    if measure.percent:
        return f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}"
    return f"{value:+.3g}" if sign else f"{value:.3g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def answer_lines(analysis: Analysis, comparisons: Sequence[Comparison], missing: Sequence[str]) -> list[str]:
    """What the study shows, in sentences: whether all runs are there, the gates among each other, against placebos."""
    study, measure = analysis.study, analysis.primary
    lines = []
    if missing:
        total = len(missing) + len(analysis.runs)
        lines.append(f"**Interim: {len(missing)} of {total} runs are missing; what follows may change.**")
    omnibus = analysis.omnibus()
    if omnibus is not None:
        found = "differ" if omnibus.p_value < 0.05 else "do not differ significantly"
        lines.append(
            f"The gates {found} in {measure.label}: analysis of variance over {omnibus.seeds} seeds, "
            f"F({omnibus.freedom[0]:.0f}, {omnibus.freedom[1]:.0f}) = {omnibus.f_value:.2f}, p = {omnibus.p_value:.2g}."
        )
    if comparisons:
        counts = {verdict: sum(one.verdict == verdict for one in comparisons) for verdict in VERDICTS}
        detectable = [size for one in comparisons if (size := one.difference.detectable) is not None]
        points = " points" if measure.percent else ""
        sizes = [shown(measure, size) for size in (min(detectable), max(detectable))] if detectable else []
        finds = f"; alone, each finds a difference of {' to '.join(sizes)}{points} with a chance of {POWER:.0%}"
        lines.append(
            f"Of {len(comparisons)} comparisons, {counts['more'] + counts['less']} differ after Holm's correction, "
            f"{counts['equivalent']} are equivalent within {shown(measure, study.margin)}{points} and "
            f"{counts['not decided']} are not decided{finds if sizes else ''}."
        )
    placebos = [one for one in comparisons if {one.one, one.other} & {*study.placebos}]
    better = [one for one in placebos if one.verdict in ("more", "less")]
    if placebos:
        named = "; ".join(f"{one.one} - {one.other} {shown(measure, one.difference.estimate, True)}" for one in better)
        lines.append(f"Against placebos: {named}." if better else "No variant differs from a placebo.")
    return lines


VERDICTS = ("more", "less", "equivalent", "not decided")


def design_lines(analysis: Analysis, stored: Mapping[str, Any]) -> str:
    """The study as it was written down."""
    study, measure = analysis.study, analysis.primary
    unit = " points" if measure.percent else ""
    variants = "\n".join(
        f"- `{name}`: {', '.join(f'{key} {value}' for key, value in flags.items())}"
        for name, flags in study.variants.items()
    )
    shared = ", ".join(f"{key} {value}" for key, value in (study.flags or {}).items())
    return "\n\n".join(
        [
            f"Primary measure: {measure.label}; smallest effect {shown(measure, study.smallest_effect)}{unit}, "
            f"equivalence margin {shown(measure, study.margin)}{unit}; seeds {', '.join(map(str, study.seeds))}, the "
            "runs of a seed with the same problems in the same order; base "
            f"`{study.base}`{f', with {shared}' if shared else ''}.",
            f"Decision: {study.decision_rule}",
            f"Stop: {study.stop_rule}",
            f"Control `{study.control}`, placebos {', '.join(f'`{name}`' for name in study.placebos) or 'none'}. "
            "Variants:",
            variants,
        ]
    )


def level_table(analysis: Analysis) -> str:
    """One row a variant: the primary measure with its spread over the seeds, and the other measures."""
    measures = [measure for measure in analysis.measures.values() if measure is not analysis.primary]
    present = [one for one in measures if any(analysis.level(name, one) for name in analysis.variants)]
    head = ["variant", "runs", f"{analysis.primary.label}{percent(analysis.primary)}", "interquartile mean"]
    head += ["sd over seeds (95 %)", *(f"{one.label}{percent(one)}" for one in present)]
    rows = []
    for name in analysis.variants:
        level, spread = analysis.level(name, analysis.primary), analysis.spread(name)
        if level is None:
            continue
        mean, middle, number = level
        cells = [f"`{name}`", str(number), shown(analysis.primary, mean), shown(analysis.primary, middle)]
        cells.append("-" if spread is None else "{} ({} to {})".format(*(shown(analysis.primary, v) for v in spread)))
        levels = [analysis.level(name, one) for one in present]
        cells += [shown(one, None if at is None else at[0]) for one, at in zip(present, levels, strict=True)]
        rows.append(cells)
    return table(head, rows)


def percent(measure: Measure) -> str:
    """Behind the name of a measure whose values are in per cent."""
    return ", %" if measure.percent else ""


def difference_notes(analysis: Analysis) -> str:
    """How to read the table of differences."""
    what = "seeds and held-out problems" if analysis.study.primary_measure == "accuracy" else "seeds"
    return (
        f"Paired by seed. Intervals and p are by the variance over {what}; p(Holm) is corrected for all comparisons "
        "below; p(equivalent) is that of two one-sided tests against the margin; detectable is the smallest true "
        f"difference that this comparison alone would have found with a chance of {POWER:.0%}."
    )


def difference_table(analysis: Analysis, comparisons: Sequence[Comparison]) -> str:
    """One row a comparison of the primary measure."""
    measure = analysis.primary
    head = ["comparison", "seeds", f"difference{', points' if measure.percent else ''}", "95 % interval", "bootstrap"]
    head += ["p", "p(Holm)", "p(equivalent)", "detectable", "verdict"]
    rows = []
    for one in comparisons:
        found = one.difference
        low, high = found.interval()
        cells = [f"`{one.one}` - `{one.other}`", str(found.seeds), shown(measure, found.estimate, True)]
        cells.append(f"{shown(measure, low, True)} to {shown(measure, high, True)}")
        cells.append("-" if one.bootstrap is None else " to ".join(shown(measure, end, True) for end in one.bootstrap))
        cells += [f"{found.p_value:.2g}", f"{one.holm_p:.2g}", f"{one.equivalence_p:.2g}"]
        rows.append([*cells, shown(measure, found.detectable), one.verdict])
    return table(head, rows) if rows else "No two variants have two seeds in common yet."


def secondary_table(analysis: Analysis) -> str:
    """Each variant against the control in every other measure."""
    rows = []
    for measure in analysis.measures.values():
        if measure is analysis.primary:
            continue
        for one in analysis.secondary(measure):
            low, high = one.difference.interval()
            interval = f"{shown(measure, low, True)} to {shown(measure, high, True)}"
            cells = [f"{measure.label}{', points' if measure.percent else ''}", f"`{one.one}`"]
            rows.append(
                [*cells, shown(measure, one.difference.estimate, True), interval, f"{one.difference.p_value:.2g}"]
            )
    return table(["measure", "variant", "difference", "95 % interval", "p"], rows)


def run_table(analysis: Analysis, source: Path, folder: Path) -> str:
    """One row a run, with its command."""
    rows = []
    for run in sorted(analysis.runs, key=lambda run: (analysis.variants.index(run["variant"]), run["seed"])):
        place = source / run["name"]
        place = place if place.is_dir() else place.with_name(place.name + ".json")  # a name may have a dot
        name = f"[{run['name']}]({Path(os.path.relpath(place, folder)).as_posix()})"
        value = shown(analysis.primary, analysis.primary.of(run))
        rows.append([name, value, f"{run['train_seconds']:.0f}", f"`{run['command']}`"])
    return table(
        ["run", f"{analysis.primary.label}{percent(analysis.primary)}", "seconds of training", "command"], rows
    )


def report_files(folder: Path) -> str:
    """The files of a report, as the last line of the command has them."""
    return f"{shown_path(folder)}/report.md  report.html  figures/"
