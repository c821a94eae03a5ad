# SPDX-License-Identifier: Apache-2.0
"""The comparison of finished runs over seeds, as Markdown.

One row a run; then one row a variant on its diversity and, where paths interacted, on its attention; then each variant
against the control (mode `none`) over the seeds that both have: the mean difference of the accuracy after training, its
95 % interval and p by the paired t-test, with Holm's correction where several variants are compared.

A variant is the whole set of flags in which the runs differ, besides the random seed: `m3po`, `m3po:raw_dot` with that
gating function, `m3po+aslr`, `m3po λ=0.3`, `m3po phase=all`. Its control has its values of the flags that a control
has, `none lr=1e-05` for `m3po λ=0.3 lr=1e-05`. Runs are compared only if their problems, model and number of steps are
the same, and in the modes that decode plainly also the accuracy before. The prompts of a seed are the same in both, the
samples are not.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
from scipy.stats import ttest_1samp
from transformers.m3po.gating.factory import gating_class
from transformers.m3po.settings import RESIDUAL_MODES
from trl.trainer.m3po.config import M3POArguments

from m3po_lab.core.errors import UserError
from m3po_lab.core.files import read_json
from m3po_lab.core.identity import difference
from m3po_lab.core.inference import holm
from m3po_lab.grpo.identity import recorded_flags, schedule_parts

CONTROL = "none"
DEFAULT_GATING_TYPE = "baseline"
SAME = ("model", "dataset", "num_eval_problems", "steps")  # of the summaries
SAME_FLAGS = (
    *("dataset", "dataset_config", "num_train_problems", "num_eval_problems", "problem_seed", "eval_seed"),
    *("system_prompt", "prompt_template", "worked_example", "chat_template_kwargs"),
    *("model_name_or_path", "model_revision", "max_steps", "num_train_epochs", "parts"),
)
NAMED = ("mode", "gating_type", "aslr_enabled")  # flags that every name of a variant has in a form of their own
# Flags that a control does not have, whose values it therefore shares with no other run.
OWN = {entry.name for entry in fields(M3POArguments)} - {"answer_start"}
DIVERSITY = tuple(f"{name}_{when}" for name in ("distinct_answers", "reward_std") for when in ("first", "last"))
SHORT = {
    "cross_path_lambda": "λ",
    "cross_path_temp": "T",
    "cross_path_phase": "phase",
    "cross_path_top_k": "peers",
    "learning_rate": "lr",
}


def differing_flags(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The flags whose values differ among the runs that have them, the seed aside; `runs` are flags by name."""
    names = {name: None for flags in runs for name in flags if name != "seed"}
    differing = []
    for name in names:
        values = {json.dumps(flags[name], sort_keys=True) for flags in runs if name in flags}
        if len(values) > 1:
            differing.append(name)
    return differing


def variant(flags: Mapping[str, Any], differing: Sequence[str]) -> str:
    """What a run is compared as: its mode, a gating function that is not the default, `+aslr`, and other differences.

    Args:
        flags: of the run.
        differing: the flags that differ among the runs.
    """
    gating_type = flags.get("gating_type", DEFAULT_GATING_TYPE)
    gating = "" if gating_type == DEFAULT_GATING_TYPE else f":{gating_type}"
    name = f"{flags['mode']}{gating}{'+aslr' if flags['aslr_enabled'] else ''}"
    shown = [flag for flag in differing if flag in flags and flag not in NAMED]
    return " ".join([name, *(f"{SHORT.get(flag, flag)}={value_text(flag, flags)}" for flag in shown)])


def value_text(name: str, flags: Mapping[str, Any]) -> str:
    """A flag's value, short."""
    value = flags[name]
    if name == "cross_path_temp" and value is None:
        value = gating_class(flags["gating_type"]).default_temperature
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def is_control(run: Mapping[str, Any]) -> bool:
    """Whether a run is one of plain GRPO."""
    return bool(run["flags"]["mode"] == CONTROL and not run["flags"]["aslr_enabled"])


def load_runs(folders: Sequence[str]) -> list[dict[str, Any]]:
    """The summaries of run folders (or of `summary.json` copies), by variant and seed.

    Raises:
        UserError: a folder has no summary, two runs share variant and seed, or runs differ in what must be equal.
    """
    runs = []
    for folder in folders:
        path = Path(folder) if folder.endswith(".json") else Path(folder) / "summary.json"
        summary = read_json(path)
        if summary is None:
            raise UserError(f"{path} is not there: give the folders of finished runs.")
        flags = recorded_flags(summary)
        runs.append({**summary, "flags": {**flags, "parts": schedule_parts(flags, summary.get("parts", []))}})
    check_alike(runs)
    differing = differing_flags([run["flags"] for run in runs])
    for run in runs:
        run["variant"] = variant(run["flags"], differing)
        run["shared"] = {name: run["flags"][name] for name in differing if name in run["flags"] and name not in OWN}
    runs.sort(key=lambda run: (not is_control(run), run["variant"], run["seed"]))
    names = [(run["variant"], run["seed"]) for run in runs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"mode {twice[0][0]} with seed {twice[0][1]} occurs twice: give one run of each.")
    check_start(runs)
    return runs


def check_alike(runs: Sequence[dict[str, Any]]) -> None:
    """Refuse runs of other problems, another model or another number of steps.

    Raises:
        UserError: it names the first such flag, with both values.
    """
    for key in SAME:
        values = {str(run[key]) for run in runs}
        if len(values) > 1:
            raise UserError(f"the runs differ in {key} ({', '.join(sorted(values))}): only like runs can be compared.")
    for run in runs[1:]:
        alike = {name: value for name, value in run["flags"].items() if name in SAME_FLAGS}
        differing = difference(runs[0]["flags"], alike)
        if differing is not None:
            raise UserError(
                f"the runs differ in {differing[0]} ({differing[1]}, {differing[2]}): only like runs can be compared."
            )


def check_start(runs: Sequence[dict[str, Any]]) -> None:
    """Refuse runs that have not begun with the same model: those that decode plainly must have one accuracy before.

    A fresh residual gate differs from seed to seed, and with it how the start model answers.

    Raises:
        UserError: it names the accuracies.
    """
    plain = [run for run in runs if run["mode"] not in RESIDUAL_MODES]
    for first in plain:
        values = {str(run["accuracy_before"]) for run in plain if run["shared"] == first["shared"]}
        if len(values) > 1:
            accuracies = ", ".join(sorted(values))
            raise UserError(f"the runs differ in accuracy_before ({accuracies}): only like runs can be compared.")


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
    """The runs of each variant, in their order."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(run["variant"], []).append(run)
    return groups


def mean_cell(values: Sequence[float | None], form: str) -> str:
    """The mean, or a dash where a run has no such number."""
    known = [value for value in values if value is not None]
    return f"{fmean(known):{form}}" if len(known) == len(values) else "-"


def attention_table(runs: Sequence[dict[str, Any]]) -> str:
    """One row a variant, means over its runs: reward, accuracy, attention, similarity and time."""
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


def diversity_table(runs: Sequence[dict[str, Any]]) -> str:
    """One row a variant, means over its runs: how different answers and rewards were, early and late."""
    lines = [
        "| mode | runs | distinct answers, first quarter | last quarter | reward std, first quarter | last quarter |",
        "|---|---|---|---|---|---|",
    ]
    for name, own in by_variant(runs).items():
        diversities = [run.get("diversity") or {} for run in own]
        cells = [mean_cell([one.get(key) for one in diversities], ".3f") for key in DIVERSITY]
        lines.append(f"| {' | '.join([f'`{name}`', str(len(own)), *cells])} |")
    lines += ["", "Means over the runs, and over the log lines of the first and of the last quarter of the training."]
    return "\n".join(lines)


def differences_to_controls(runs: Sequence[dict[str, Any]]) -> dict[tuple[str, str], np.ndarray]:
    """For each variant and its control, by name, the differences in accuracy after training over their common seeds.

    A variant without a control here is against `none` over no seed.
    """
    after = {name: {run["seed"]: run["accuracy_after"] for run in own} for name, own in by_variant(runs).items()}
    differences = {}
    for name, own in sorted(by_variant(runs).items()):
        if not is_control(own[0]):
            like = [run["variant"] for run in runs if is_control(run) and run["shared"] == own[0]["shared"]]
            control = like[0] if like else CONTROL
            seeds = sorted(set(after[name]) & set(after[control])) if like else []
            differences[name, control] = np.array([after[name][seed] - after[control][seed] for seed in seeds])
    return differences


def against_control(runs: Sequence[dict[str, Any]]) -> list[str]:
    """One sentence for each variant, and one on how many comparisons these are where there are several."""
    differences = differences_to_controls(runs)
    tested = [mode for mode, values in differences.items() if len(values) >= 3]
    # Without spread the t-test would make certainty of a chance: it counts as a test that shows nothing.
    even = {mode for mode in tested if np.ptp(differences[mode]) < 1e-9}
    tests = {mode: ttest_1samp(differences[mode], 0.0) for mode in tested if mode not in even}
    raw = [float(tests[mode].pvalue) if mode in tests else 1.0 for mode in tested]
    corrected = dict(zip(tested, holm(raw), strict=True))
    sentences = []
    for mode, values in differences.items():
        name, control = mode
        if mode not in corrected:
            sentences.append(
                f"`{name}` against `{control}`: {len(values)} common seeds, too few to compare (3 at least)."
            )
            continue
        points = f"{100 * values.mean():+.1f} points of accuracy after training"
        if mode in even:
            sentences.append(
                f"`{name}` against `{control}`: {points} in each of {len(values)} seeds, no spread to test by."
            )
            continue
        low, high = tests[mode].confidence_interval(0.95)
        shown = "differs" if corrected[mode] < 0.05 else "does not differ significantly"
        holm_p = f" ({corrected[mode]:.2g} after Holm's correction)" if len(tested) > 1 else ""
        sentences.append(
            f"`{name}` {shown} from `{control}` over {len(values)} seeds: {points}, 95 % interval {100 * low:+.1f} to "
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
    diversity = [diversity_table(runs), ""] if any(run.get("diversity") for run in runs) else []
    return "\n".join([run_table(runs), "", *attention, *diversity, *against_control(runs)])
