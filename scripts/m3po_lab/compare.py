# SPDX-License-Identifier: Apache-2.0
"""Compare finished runs over seeds: ``.venv/bin/python -m m3po_lab.compare runs/*`` prints Markdown.

One row a run; where paths interacted also one row a mode, with what their attention was like. Then each mode against
the control (`none`) over the seeds that both have: the mean difference of the accuracy after training, its 95 %
interval and p by the paired t-test, with Holm's correction where several modes are compared with the one control. With
another gate than the default, or with ASLR, a mode is one of its own (`m3po:raw_dot`, `m3po+aslr`).
Runs are compared only if their problems, model and number of steps are the same, and in the modes that decode plainly
also the accuracy before. The prompts of a seed are the same in both, the samples are not.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
from scipy.stats import ttest_1samp
from transformers.m3po.settings import CROSS_PATH_MODES, RESIDUAL_MODES

from m3po_lab.errors import OneLineFlags, UserError, exit_code
from m3po_lab.files import read_json
from m3po_lab.stats import holm

CONTROL = "none"
DEFAULT_GATE = "baseline"
SAME = ("model", "dataset", "num_eval_problems", "steps")


def variant(mode: str, gating_type: str | None, aslr: bool) -> str:
    """What is compared: the mode, its gate if it has one and another than the default, and `+aslr`."""
    gate = f":{gating_type}" if mode in CROSS_PATH_MODES and gating_type not in (None, DEFAULT_GATE) else ""
    return f"{mode}{gate}{'+aslr' if aslr else ''}"


def load_runs(folders: Sequence[str]) -> list[dict[str, Any]]:
    """The summaries of run folders (or of `summary.json` copies), by mode and seed.

    Raises:
        UserError: a folder has no summary, two runs share mode and seed, or runs differ in what must be equal.
    """
    runs = []
    for folder in folders:
        path = Path(folder) if folder.endswith(".json") else Path(folder) / "summary.json"
        summary = read_json(path)
        if summary is None:
            raise UserError(f"{path} is not there: give the folders of finished runs.")
        gate = summary.get("gating_type") or summary.get("config", {}).get("gating_type")
        runs.append({**summary, "variant": variant(summary["mode"], gate, bool(summary.get("aslr_enabled")))})
    runs.sort(key=lambda run: (run["variant"] != CONTROL, run["variant"], run["seed"]))
    names = [(run["variant"], run["seed"]) for run in runs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"mode {twice[0][0]} with seed {twice[0][1]} occurs twice: give one run of each.")
    # A fresh residual gate differs from seed to seed, and with it how the start model answers.
    plain = [run for run in runs if run["mode"] not in RESIDUAL_MODES]
    for key, like in [*((key, runs) for key in SAME), ("accuracy_before", plain)]:
        values = {str(run[key]) for run in like}
        if len(values) > 1:
            raise UserError(f"the runs differ in {key} ({', '.join(sorted(values))}): only like runs can be compared.")
    return runs


def run_table(runs: Sequence[dict[str, Any]]) -> str:
    """One row a run: accuracy and format before and after, the paired test of the run, and its time."""
    lines = [
        "| mode | seed | accuracy before | after | gained / lost | p | format before | after | seconds per step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{run['variant']}` | {run['seed']} | {run['accuracy_before']:.3f} | {run['accuracy_after']:.3f} | "
        f"{run['gained']} / {run['lost']} | {run['p_value']:.1e} | {run['format_before']:.3f} | "
        f"{run['format_after']:.3f} | {run['seconds_per_step']:.1f} |"
        for run in runs
    ]
    return "\n".join(lines)


def by_variant(runs: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each mode, in their order."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(run["variant"], []).append(run)
    return groups


def mean_cell(values: Sequence[float | None], form: str) -> str:
    """The mean, or a dash where a run has no such number."""
    known = [value for value in values if value is not None]
    return f"{fmean(known):{form}}" if len(known) == len(values) else "-"


def attention_table(runs: Sequence[dict[str, Any]]) -> str:
    """One row a mode, means over its runs: reward, accuracy, attention, similarity and time."""
    lines = [
        "| mode | runs | reward, last step | accuracy after, % | attention entropy | largest weight | variance | "
        "similarity | seconds per step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    columns = {
        "attention_entropy": ".3f",
        "attention_max": ".3f",
        "attention_variance": ".3g",
        "similarity_mean": ".3g",
    }
    for name, own in by_variant(runs).items():
        after = [100 * run["accuracy_after"] for run in own]
        spread = f" ± {stdev(after):.1f}" if len(after) > 1 else ""
        cells = [
            f"`{name}`",
            str(len(own)),
            mean_cell([run.get("reward_last") for run in own], ".3f"),
            f"{fmean(after):.1f}{spread}",
            *(mean_cell([(run.get("attention") or {}).get(key) for run in own], form) for key, form in columns.items()),
            f"{median(run['seconds_per_step'] for run in own):.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Means over the runs of a mode, attention and similarity over their steps too; ± is the sample standard "
        "deviation in points, seconds per step the median.",
    ]
    return "\n".join(lines)


def against_control(runs: Sequence[dict[str, Any]]) -> list[str]:
    """One sentence for each mode, and one on how many comparisons these are where there are several."""
    after = {name: {run["seed"]: run["accuracy_after"] for run in own} for name, own in by_variant(runs).items()}
    control = after.pop(CONTROL, {})
    differences = {
        mode: np.array([seeds[seed] - control[seed] for seed in sorted(set(seeds) & set(control))])
        for mode, seeds in sorted(after.items())
    }
    tested = [mode for mode, values in differences.items() if len(values) >= 3]
    # Without spread the t-test would make certainty of a chance: it counts as a test that shows nothing.
    even = {mode for mode in tested if np.ptp(differences[mode]) < 1e-9}
    tests = {mode: ttest_1samp(differences[mode], 0.0) for mode in tested if mode not in even}
    raw = [float(tests[mode].pvalue) if mode in tests else 1.0 for mode in tested]
    corrected = dict(zip(tested, holm(raw), strict=True))
    sentences = []
    for mode, values in differences.items():
        if mode not in corrected:
            sentences.append(
                f"`{mode}` against `{CONTROL}`: {len(values)} common seeds, too few to compare (3 at least)."
            )
            continue
        points = f"{100 * values.mean():+.1f} points of accuracy after training"
        if mode in even:
            sentences.append(
                f"`{mode}` against `{CONTROL}`: {points} in each of {len(values)} seeds, no spread to test by."
            )
            continue
        low, high = tests[mode].confidence_interval(0.95)
        shown = "differs" if corrected[mode] < 0.05 else "does not differ significantly"
        holm_p = f" ({corrected[mode]:.2g} after Holm's correction)" if len(tested) > 1 else ""
        sentences.append(
            f"`{mode}` {shown} from `{CONTROL}` over {len(values)} seeds: {points}, 95 % interval {100 * low:+.1f} to "
            f"{100 * high:+.1f}, paired t-test p = {tests[mode].pvalue:.2g}{holm_p}."
        )
    if len(tested) > 1:
        sentences += [
            "",
            f"{len(tested)} comparisons with the one control at once: whether a mode differs goes by p after Holm's "
            "correction; each interval is that of one comparison alone.",
        ]
    return sentences


def comparison(folders: Sequence[str]) -> str:
    """The tables and the sentences, as Markdown; the errors of `load_runs`."""
    runs = load_runs(folders)
    attention = [attention_table(runs), ""] if any(run.get("attention") for run in runs) else []
    return "\n".join([run_table(runs), "", *attention, *against_control(runs)])


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison of the run folders given; returns 2 with one line for a wrong input."""
    parser = OneLineFlags(description="Compare finished runs over seeds.")
    parser.add_argument("folders", nargs="+", help="run folders, or summary.json files")
    return exit_code(lambda: print(comparison(parser.parse_args(argv).folders)), "Stopped.")


if __name__ == "__main__":
    sys.exit(main())
