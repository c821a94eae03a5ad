# SPDX-License-Identifier: Apache-2.0
"""Pretraining with hyper-connections against pretraining without: two runs for each random seed, and their report."""

from collections.abc import Sequence
from pathlib import Path

from m3po_lab.command_line.idle_flags import MHC, without
from m3po_lab.core.files import check_writable, shown_path
from m3po_lab.experiments.runs import PlannedRun, run_all
from m3po_lab.pretraining.arguments import check_folder, parse
from m3po_lab.pretraining.report import write_report

VARIANTS = {"baseline": "false", "mhc": "true"}


def run_pairs(config: Path, seeds: Sequence[int], folder: Path, words: Sequence[str]) -> int:
    """Run what is not done and report; returns an exit code.

    Args:
        config: the YAML file of all runs.
        seeds: one pair of runs for each.
        folder: of the runs and the report.
        words: flags for every run.

    Raises:
        UserError: a flag is wrong, or a folder has another run; nothing is trained then.
    """
    check_writable(folder)
    runs = []
    for seed in seeds:
        for variant, enabled in VARIANTS.items():
            place = folder / f"{variant}-seed{seed}"
            flags = words if variant == "mhc" else without(words, MHC.split())
            command = [shown_path(config), *flags, "--mhc_enabled", enabled, "--seed", str(seed)]
            command += ["--output_dir", shown_path(place)]
            check_folder(parse(command))
            runs.append(PlannedRun(f"{variant}, seed {seed}", place, command))
    code = run_all("m3po_lab.pretrain", runs, "result.json")
    if code:
        return code
    print(f"\n{write_report([run.folder for run in runs], folder)}\n")
    print(f"report  {shown_path(folder)}/report.md  curves.png  routing.png")
    return 0
