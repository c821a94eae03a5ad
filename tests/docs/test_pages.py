# SPDX-License-Identifier: Apache-2.0
"""What the pages claim about the code and the runs is what the code and the runs say."""

import dataclasses
import re
from pathlib import Path

import pytest
from transformers.m3po.aslr.modules import ASLR_MODULES
from trl.trainer.m3po.config import M3POArguments

from m3po_lab.compare import main as compare
from m3po_lab.core.files import read_json

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "overlay/transformers/src/transformers/m3po"
RESULTS = sorted((ROOT / "docs" / "results").glob("*/*.json"))


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def logged_metrics() -> set[str]:
    """The names after `m3po/` in the trainer's glue and in the statistics it passes on."""
    glue = page("overlay/trl/trl/trainer/m3po/rollouts.py")
    statistics = page(f"{PACKAGE}/statistics.py")
    names = re.findall(r'_log\("(\w+)"', glue) + re.findall(r'"m3po/(\w+)"', glue)
    latent = page(f"{PACKAGE}/latent_rollout.py").split("means = {")[1]
    names += re.findall(r'^            "(\w+)": ', latent, flags=re.MULTILINE)
    names += re.findall(r'"(similarity_error)": ', page(f"{PACKAGE}/gating/parameter_free_gates.py"))
    names += re.findall(r'"(gating_\w+)": ', page("overlay/trl/trl/trainer/m3po/gating.py"))
    names += re.findall(r'found\["(\w+)"\] = ', statistics)
    names += [
        "aggregator_weight_entropy",
        *(f"{name.removeprefix('m3po_')}_{what}" for name in ASLR_MODULES for what in ("grad_norm", "distance")),
    ]
    return set(names) | set(re.findall(r'^ {8}(?: {4})?"(\w+)": ', statistics, flags=re.MULTILINE))


def test_every_logged_metric_is_defined_on_the_metrics_page() -> None:
    text = page("docs/metrics.md").replace("`, `_min`, `_max`", "` `m3po/similarity_min` `m3po/similarity_max`")
    defined = set(re.findall(r"`m3po/(\w+)`", text))
    assert len(logged_metrics()) == 31
    assert logged_metrics() == defined


def test_every_flag_stands_in_the_table_of_flags() -> None:
    listed = set(re.findall(r"`(\w+)`", page("docs/modes.md").split("## Flags")[1].split("## In Python")[0]))
    flags = {entry.name for entry in dataclasses.fields(M3POArguments)}
    assert len(flags) == 25
    assert flags <= listed


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("demo", "docs/results.md"),
        ("demo-14-steps", "docs/results.md"),
        ("demo-short", "docs/results.md"),
        ("gates-short", "docs/gates.md"),
    ],
)
def test_a_table_of_results_is_what_compare_prints(name: str, where: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare([str(path) for path in RESULTS if path.parent.name == name]) == 0
    assert capsys.readouterr().out.strip() in page(where)


@pytest.mark.parametrize(
    ("name", "marker"), [("gates-cpu", "gates"), ("gate-step-cpu", "gate-step"), ("gate-training-cpu", "gate-training")]
)
def test_a_table_of_a_benchmark_is_what_it_wrote(name: str, marker: str) -> None:
    shown = page("docs/gates.md").split(f"<!-- begin: {marker} -->")[1].split(f"<!-- end: {marker} -->")[0]
    assert shown.strip() == page(f"benchmarks/results/{name}.md").strip()


def test_the_run_shown_in_the_readme_is_the_recorded_one() -> None:
    run = read_json(ROOT / "docs" / "results" / "demo" / "m3po-seed0.json")
    assert run is not None
    readme = page("README.md")
    assert f"{run['accuracy_before']:.1%}" in readme and f"{run['accuracy_after']:.1%}" in readme
    assert run["verdict"] in readme


def test_recorded_runs_come_from_commits_without_changes() -> None:
    runs = [read_json(path) for path in RESULTS]
    assert len(runs) >= 4
    assert [run["git_dirty"] for run in runs if run] == [False] * len(RESULTS)


def test_patches_to_unsloths_files_are_short_and_say_their_licence() -> None:
    patches = sorted(path for name in ("unsloth", "unsloth_zoo") for path in (ROOT / "patches" / name).glob("*.patch"))
    texts = [path.read_text(encoding="utf-8") for path in patches]
    assert len(texts) >= 3 and all(re.search(r"^Licence: ", text, re.MULTILINE) for text in texts)
    added = [
        line for text in texts for line in text.splitlines() if line.startswith("+") and not line.startswith("+++")
    ]
    assert len(added) <= 60
