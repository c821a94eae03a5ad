# SPDX-License-Identifier: Apache-2.0
"""Runs are compared over seeds against the control, and only like with like."""

import json
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import ttest_rel

from m3po_lab.compare import main

AFTER = {"none": [0.50, 0.55, 0.53], "m3po": [0.56, 0.60, 0.57]}


def write_runs(folder: Path, **changes: Any) -> list[str]:
    paths = []
    for mode, values in AFTER.items():
        for seed, value in enumerate(values):
            run = {
                "mode": mode,
                "seed": seed,
                "model": "tiny",
                "dataset": "sums",
                "num_eval_problems": 100,
                "steps": 10,
                "accuracy_before": 0.4,
                "accuracy_after": value,
                "gained": 20,
                "lost": 5,
                "p_value": 0.004,
                "format_before": 1.0,
                "format_after": 1.0,
                "seconds_per_step": 2.0,
            }
            path = folder / f"{mode}-{seed}" / "summary.json"
            path.parent.mkdir()
            path.write_text(json.dumps(run | changes.get(f"{mode}_{seed}", {})))
            paths.append(str(path.parent))
    return paths


def test_difference_to_the_control_is_the_paired_t_test_over_common_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(write_runs(tmp_path)) == 0
    printed = capsys.readouterr().out
    test = ttest_rel(AFTER["m3po"], AFTER["none"])
    low, high = test.confidence_interval(0.95)
    assert f"+5.0 points of accuracy after training, 95 % interval {100 * low:+.1f} to {100 * high:+.1f}" in printed
    assert f"p = {test.pvalue:.2g}." in printed
    assert printed.count("| `m3po` |") == 3 and printed.index("| `none` | 0 |") < printed.index("| `m3po` | 0 |")


def test_two_common_seeds_are_too_few_to_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(write_runs(tmp_path)[:-1]) == 0
    assert "2 common seeds, too few to compare" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"m3po_1": {"steps": 11}}, "the runs differ in steps (10, 11)"),
        ({"m3po_1": {"seed": 0}}, "mode m3po with seed 0 occurs twice"),
    ],
)
def test_unlike_runs_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], line: str
) -> None:
    assert main(write_runs(tmp_path, **changes)) == 2
    assert line in capsys.readouterr().err


def test_a_folder_without_summary_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert f"{tmp_path}/summary.json is not there" in capsys.readouterr().err
