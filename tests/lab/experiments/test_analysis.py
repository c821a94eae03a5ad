# SPDX-License-Identifier: Apache-2.0
"""The analysis of a study on made-up summaries whose results are known."""

import re
from typing import Any

import numpy as np
import pytest
from scipy.stats import chi2, f, ttest_rel

from m3po_lab.study.analysis import Analysis
from m3po_lab.study.plan import Study
from m3po_lab.study.report import answer_lines, difference_table, level_table

PROBLEMS = 200
GATES = ("cosine", "dot")


def study(**changes: Any) -> Study:
    said = {
        "question": "Does it matter?",
        "decision_rule": "-",
        "stop_rule": "-",
        "base": "base.yaml",
        "variants": dict.fromkeys(("none", *GATES, "uniform"), {}),
        "control": "none",
        "gates": [*GATES],
        "placebos": ["uniform"],
        "seeds": [0, 1, 2, 3],
        "smallest_effect": 0.1,
    }
    return Study(**{**said, **changes})


def runs(accuracies: dict[str, float], seeds: int = 4, scatter: float = 0.01) -> list[dict[str, Any]]:
    """Summaries of runs with these accuracies in the mean; the problems are the same ones, some harder than others."""
    random = np.random.default_rng(0)
    order = random.permutation(PROBLEMS)
    made = []
    for variant, accuracy in accuracies.items():
        for seed in range(seeds):
            right = np.zeros(PROBLEMS, dtype=int)
            right[order[: round(PROBLEMS * (accuracy + random.normal(0, scatter)))]] = 1
            flipped = random.choice(PROBLEMS, 6, replace=False)
            right[flipped] = 1 - right[flipped]
            summary = {
                "variant": variant,
                "seed": seed,
                "correct_after": "".join(map(str, right)),
                "accuracy_after": right.mean(),
                "format_after": 1.0,
                "history": {"step": [1, 2], "accuracy": [0.0, accuracy], "grad_norm": [1.0 + seed, 2.0]},
                "sampled": None,
                "seconds_per_step": 1.0,
            }
            made.append(summary)
    return made


def test_all_pairs_are_compared_and_what_differs_is_found():
    accuracies = {"none": 0.5, "cosine": 0.51, "dot": 0.5, "uniform": 0.2}
    analysis = Analysis(study(), runs(accuracies))
    comparisons = analysis.compare()
    assert len(comparisons) == 6 and (comparisons[0].one, comparisons[0].other) == ("cosine", "none")
    for one in comparisons:
        found, own = one.difference.estimate, {name: analysis.values(name, analysis.primary) for name in accuracies}
        wanted = np.mean(list(own[one.one].values())) - np.mean(list(own[one.other].values()))
        assert found == pytest.approx(wanted)
        assert one.holm_p >= one.difference.p_value and one.bootstrap[0] < found < one.bootstrap[1]
        against_placebo = one.one == "uniform"
        assert one.verdict == ("less" if against_placebo else "equivalent")
    assert "The gates do not differ significantly" in answer_lines(analysis, comparisons, [])[0]
    text = " ".join(answer_lines(analysis, comparisons, ["dot-seed9"]))
    assert "Interim: 1 of 17 runs are missing" in text and re.search(r"uniform - none -[23]\d[.]", text)
    assert "3 differ after Holm's correction, 3 are equivalent within 10.0 points and 0 are not decided" in text
    assert difference_table(analysis, comparisons).count("\n") == 7 and level_table(analysis).count("\n") == 5


def test_what_is_neither_different_nor_equivalent_is_not_decided():
    analysis = Analysis(study(smallest_effect=0.005), runs(dict.fromkeys(("none", *GATES, "uniform"), 0.5)))
    comparisons = analysis.compare()
    assert {one.verdict for one in comparisons} == {"not decided"}
    assert all(one.difference.detectable > 0.005 for one in comparisons)
    assert "No variant differs from a placebo." in answer_lines(analysis, comparisons, [])


def test_the_gates_are_compared_among_each_other_by_repeated_measures():
    """With two of them F is the square of the paired t; with three, sums of squares by hand."""
    analysis = Analysis(study(), runs({"none": 0.4, "cosine": 0.5, "dot": 0.6, "uniform": 0.1}, scatter=0.05))
    values = [list(analysis.values(gate, analysis.primary).values()) for gate in GATES]
    found = analysis.omnibus()
    assert found.f_value == pytest.approx(ttest_rel(*values).statistic ** 2) and found.freedom == (1, 3)
    three = Analysis(study(gates=["none", *GATES]), analysis.runs)
    table = np.array([list(three.values(name, three.primary).values()) for name in three.study.gates])
    between = 4 * ((table.mean(1) - table.mean()) ** 2).sum() / 2
    rest = ((table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()) ** 2).sum() / 6
    found = three.omnibus()
    assert found.f_value == pytest.approx(between / rest) and found.p_value == pytest.approx(f.sf(between / rest, 2, 6))
    assert Analysis(study(gates=["dot"]), analysis.runs).omnibus() is None


def test_seeds_that_only_one_variant_has_are_left_out():
    made = runs({"none": 0.5, "cosine": 0.5, "dot": 0.5, "uniform": 0.5})
    analysis = Analysis(study(), [run for run in made if (run["variant"], run["seed"]) != ("dot", 2)])
    seeds = {(one.one, one.other): one.difference.seeds for one in analysis.compare()}
    assert seeds["dot", "none"] == 3 and seeds["cosine", "none"] == 4
    assert analysis.omnibus().seeds == 3


def test_other_measures_are_those_of_the_runs_without_problems():
    analysis = Analysis(study(accuracy_level=0.3), runs({"none": 0.5, "cosine": 0.7, "dot": 0.5, "uniform": 0.5}))
    (cosine, *_) = analysis.secondary(analysis.measures["area_under_curve"])
    assert (cosine.one, cosine.difference.estimate) == ("cosine", pytest.approx(0.1)) and cosine.holm_p is None
    assert analysis.level("dot", analysis.measures["gradient_norm"])[0] == pytest.approx(np.mean([1.5, 2, 2.5, 3]))
    assert analysis.level("dot", analysis.measures["pass_at_n"]) is None
    assert analysis.level("dot", analysis.measures["steps_to_level"])[0] == 3.0


def test_the_spread_over_seeds_has_its_interval():
    analysis = Analysis(study(), runs({"none": 0.5, "cosine": 0.5, "dot": 0.5, "uniform": 0.5}, scatter=0.05))
    spread, low, high = analysis.spread("none")
    values = list(analysis.values("none", analysis.primary).values())
    assert spread == pytest.approx(np.std(values, ddof=1))
    assert (low, high) == pytest.approx(
        (spread * (3 / chi2.ppf(0.975, 3)) ** 0.5, spread * (3 / chi2.ppf(0.025, 3)) ** 0.5)
    )
