# SPDX-License-Identifier: Apache-2.0
"""Compare finished runs over seeds: ``.venv/bin/python -m m3po_lab.compare runs/*`` prints Markdown.

One row a run, then each mode against the control (`none`) over the seeds that both have: the mean difference of the
accuracy after training, its 95 % interval and p by the paired t-test. With ASLR a mode is one of its own (`m3po+aslr`).
Runs are compared only if their problems, model and number of steps are the same, and in the modes that decode plainly
also the accuracy before. The prompts of a seed are the same in both, the samples are not.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import ttest_1samp
from transformers.m3po.settings import RESIDUAL_MODES

from m3po_lab.config import UserError
from m3po_lab.files import read_json

CONTROL = "none"
SAME = ("model", "dataset", "num_eval_problems", "steps")


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
        aslr = "+aslr" if summary.get("aslr_enabled") else ""
        runs.append({**summary, "variant": f"{summary['mode']}{aslr}"})
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


def against_control(runs: Sequence[dict[str, Any]]) -> list[str]:
    """One sentence for each mode that shares seeds with the control."""
    after: dict[str, dict[int, float]] = {}
    for run in runs:
        after.setdefault(run["variant"], {})[run["seed"]] = run["accuracy_after"]
    sentences = []
    for mode in sorted(set(after) - {CONTROL}):
        seeds = sorted(set(after[mode]) & set(after.get(CONTROL, {})))
        if len(seeds) < 3:
            sentences.append(
                f"`{mode}` against `{CONTROL}`: {len(seeds)} common seeds, too few to compare (3 at least)."
            )
            continue
        differences = np.array([after[mode][seed] - after[CONTROL][seed] for seed in seeds])
        test = ttest_1samp(differences, 0.0)
        low, high = test.confidence_interval(0.95)
        shown = "differs" if test.pvalue < 0.05 else "does not differ significantly"
        sentences.append(
            f"`{mode}` {shown} from `{CONTROL}` over {len(seeds)} seeds: {100 * differences.mean():+.1f} points of "
            f"accuracy after training, 95 % interval {100 * low:+.1f} to {100 * high:+.1f}, paired t-test "
            f"p = {test.pvalue:.2g}."
        )
    return sentences


def comparison(folders: Sequence[str]) -> str:
    """The table and the sentences, as Markdown; the errors of `load_runs`."""
    runs = load_runs(folders)
    return "\n".join([run_table(runs), "", *against_control(runs)])


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison of the run folders given; returns 2 with one line for a wrong input."""
    parser = argparse.ArgumentParser(description="Compare finished runs over seeds.", allow_abbrev=False)
    parser.add_argument("folders", nargs="+", help="run folders, or summary.json files")
    try:
        print(comparison(parser.parse_args(argv).folders))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
