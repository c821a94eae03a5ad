# SPDX-License-Identifier: Apache-2.0
"""Runs are compared over seeds against the control, and only like with like."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import ttest_rel

from m3po_lab.compare import main
from m3po_lab.core.inference import holm

AFTER = {"none": [0.50, 0.55, 0.53], "m3po": [0.56, 0.60, 0.57]}
THREE = AFTER | {"h3po": [0.53, 0.57, 0.56]}
ATTENTION = {"attention_entropy": 1.4, "attention_max": 0.4, "attention_variance": 0.02, "similarity_mean": 0.0123}


def write_runs(folder: Path, after: dict[str, list[float]] = AFTER, **changes: Any) -> list[str]:
    paths = []
    for mode, values in after.items():
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
    assert f"p = {test.pvalue:.2g}." in printed and "Holm" not in printed and "attention" not in printed
    assert printed.count("| `m3po` |") == 3 and printed.index("| `none` | 0 |") < printed.index("| `m3po` | 0 |")


def test_several_comparisons_are_judged_after_holms_correction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(write_runs(tmp_path, THREE)) == 0
    printed = capsys.readouterr().out
    raw = [float(ttest_rel(THREE[mode], THREE["none"]).pvalue) for mode in ("h3po", "m3po")]
    assert max(raw) < 0.05 and holm(raw)[1] == 2 * raw[1]
    for p, corrected in zip(raw, holm(raw), strict=True):
        assert f"p = {p:.2g} ({corrected:.2g} after Holm's correction)." in printed
    assert "\n2 comparisons with the one control at once: " in printed


def test_what_one_test_alone_would_call_a_difference_is_none_among_three(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    after = {"none": [0.50, 0.55, 0.53], "m3po": [0.54, 0.60, 0.60], "h3po": [0.5, 0.6, 0.5], "hrpo": [0.4, 0.6, 0.5]}
    assert main(write_runs(tmp_path, {name: after[name] for name in ("none", "m3po")})) == 0
    assert "`m3po` differs from `none`" in capsys.readouterr().out
    (tmp_path / "all").mkdir()
    assert main(write_runs(tmp_path / "all", after)) == 0
    assert "`m3po` does not differ significantly from `none`" in capsys.readouterr().out


def test_the_same_difference_in_every_seed_is_no_certainty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The t-test would say p = 0 of three equal differences, and nothing (NaN) of three zeros."""
    after = THREE | {"h3po": [value + 0.05 for value in AFTER["none"]], "hrpo": AFTER["none"]}
    assert main(write_runs(tmp_path, after)) == 0
    printed = capsys.readouterr().out
    assert "`h3po` against `none`: +5.0 points of accuracy after training in each of 3 seeds, no spread" in printed
    assert "`hrpo` against `none`: +0.0 points of accuracy after training in each of 3 seeds" in printed
    p = float(ttest_rel(AFTER["m3po"], AFTER["none"]).pvalue)
    assert f"p = {p:.2g} ({3 * p:.2g} after Holm's correction)" in printed and "nan" not in printed


def test_attention_has_one_row_a_mode_over_its_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes: dict[str, Any] = {
        f"m3po_{seed}": {
            "gating_type": "raw_dot",
            "reward_last": 0.5 + 0.1 * seed,
            "attention": ATTENTION | {"attention_entropy": 1.0 + seed},
            "seconds_per_step": [9.0, 4.0, 5.0][seed],
        }
        for seed in range(3)
    }
    changes |= {f"none_{seed}": {"reward_last": 0.5, "attention": None} for seed in range(2)}  # one without the keys
    assert main(write_runs(tmp_path, **changes)) == 0
    tables = capsys.readouterr().out.split("\n\n")
    assert tables[1].splitlines()[2:] == [
        "| `none` | 3 | - | 52.7 ± 2.5 | - | - | - | - | 2.0 |",
        "| `m3po:raw_dot` | 3 | 0.600 | 57.7 ± 2.1 | 2.000 | 0.400 | 0.02 | 0.0123 | 5.0 |",
    ]
    assert tables[2].startswith("Means over the runs of a mode") and "`m3po:raw_dot` differs from" in tables[3]


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ({"gating_type": "raw_dot"}, "m3po:raw_dot"),
        ({"config": {"gating_type": "raw_dot"}}, "m3po:raw_dot"),
        ({"gating_type": "raw_dot", "aslr_enabled": True}, "m3po:raw_dot+aslr"),
        ({"gating_type": "baseline"}, "m3po"),
        ({"gating_type": None, "config": {}}, "m3po"),
        ({"mode": "hrpo", "config": {"gating_type": "raw_dot"}}, "hrpo"),
    ],
)
def test_a_gate_makes_a_mode_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], told: dict[str, Any], name: str
) -> None:
    assert main(write_runs(tmp_path, m3po_0=told)) == 0
    assert f"| `{name}` | 0 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({"cross_path_lambda": 0.3}, "m3po λ=0.3"),
        ({"cross_path_phase": "all"}, "m3po phase=all"),
        ({"cross_path_temp": 0.5}, "m3po T=0.5"),
        ({"cross_path_lambda": 1.0, "cross_path_phase": "all", "cross_path_top_k": 2}, "m3po λ=1 phase=all peers=2"),
    ],
)
def test_what_differs_among_the_runs_is_in_the_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: dict[str, Any], name: str
) -> None:
    """A λ of 0.3 in one seed of three was once pooled with the others without a word."""
    assert main(write_runs(tmp_path, m3po_1={"config": flags})) == 0
    printed = capsys.readouterr().out
    assert f"| `{name}` | 1 |" in printed and f"`{name}` against `none`: 1 common seeds" in printed
    assert printed.count("| `m3po") == 3 and "2 common seeds, too few to compare" in printed


def test_a_variant_is_compared_with_the_control_that_has_its_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And where there is none, it says so; the accuracy before may differ between controls of other flags."""
    other = {"config": {"learning_rate": 1e-3, "max_completion_length": 9}, "accuracy_before": 0.2}
    first = write_runs(tmp_path)
    (tmp_path / "more").mkdir()
    changes = {f"{mode}_{seed}": other for mode in AFTER for seed in range(3)}
    folders = [*first, *write_runs(tmp_path / "more", **changes)]
    assert main(folders) == 0
    printed = capsys.readouterr().out
    rest = "max_completion_length=9"
    assert f"`m3po lr=0.001 {rest}` differs from `none lr=0.001 {rest}` over 3 seeds" in printed
    assert re.search(r"`m3po (lr=1e-06 max_completion_length=\d+)` differs from `none \1` over 3 seeds", printed)
    assert main([folder for folder in folders if "more/none" not in folder]) == 0
    assert f"`m3po lr=0.001 {rest}` against `none`: 0 common seeds, too few" in capsys.readouterr().out


def test_diversity_has_one_row_a_variant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = {
        "distinct_answers_first": 4.0,
        "distinct_answers_last": 2.5,
        "reward_std_first": 0.5,
        "reward_std_last": 0.1,
    }
    changes = {f"none_{seed}": {"diversity": {**told, "distinct_answers_first": 3.0 + seed}} for seed in range(3)}
    assert main(write_runs(tmp_path, **changes)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| `none` | 3 | 4.000 | 2.500 | 0.500 | 0.100 |" in lines and "| `m3po` | 3 | - | - | - | - |" in lines


def test_two_common_seeds_are_too_few_to_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(write_runs(tmp_path)[:-1]) == 0
    assert "2 common seeds, too few to compare" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"m3po_1": {"steps": 11}}, "the runs differ in steps (10, 11)"),
        ({"m3po_1": {"config": {"eval_seed": 1}}}, "the runs differ in eval_seed (999, 1)"),
        ({"m3po_1": {"config": {"num_train_problems": 5}}}, "the runs differ in num_train_problems (4000, 5)"),
        ({"m3po_1": {"accuracy_before": 0.3}}, "the runs differ in accuracy_before (0.3, 0.4)"),
        (
            {"m3po_1": {"parts": [{"from_step": 0, "max_steps": 5}, {"from_step": 5, "max_steps": 10}]}},
            "in parts ([], [[",
        ),
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
