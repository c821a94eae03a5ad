# SPDX-License-Identifier: Apache-2.0
"""What the pages claim about the code and the runs is what the code and the runs say."""

import re

import pytest
from docs.pages import PAGES, ROOT, page
from trl.trainer.m3po.metrics import METRICS

from m3po_lab.compare import main as compare
from m3po_lab.core.files import read_json
from m3po_lab.documentation import reference
from m3po_lab.eval_gsm8k import parser
from m3po_lab.grpo.config import RunParser
from patchset import pins, series

RUNS = (ROOT / "docs" / "results").glob("*/*.json")
RESULTS = sorted(path for path in RUNS if path.name != "study.json")


def test_the_tables_of_flags_and_metrics_are_what_the_code_says() -> None:
    assert reference.stale() == {}


def test_a_table_that_is_out_of_date_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "thinking_length", METRICS["thinking_length"]._replace(unit="words"))
    assert [path.name for path in reference.stale()] == ["metrics.md"]


def test_every_generation_flag_that_the_patches_declare_stands_on_the_page_of_flags() -> None:
    transformers = next(up for up in pins.load(ROOT) if up.name == "transformers")
    start = "+        self."
    lines = [line for patch in series.load(transformers) for line in patch.diff.decode().splitlines()]
    declared = {
        line.split()[1].removeprefix("self.") for line in lines if line.startswith(start) and "kwargs.pop" in line
    }
    assert len(declared) == 12
    assert declared <= {row[0].strip("`") for row in reference.generate_arguments()}


def test_every_logged_number_that_a_page_names_exists() -> None:
    named = {metric for name in PAGES for metric in re.findall(r"`m3po/(\w+)`", page(name))}
    assert named == METRICS.keys()


def test_every_flag_of_a_training_or_evaluation_that_a_page_shows_exists() -> None:
    """Looks at the words behind the name of a script; the commands of other tools have flags of their own."""
    evaluation = re.findall(r"--\w+", parser().format_help())
    for script, flags in (("train_grpo.sh", {*RunParser().flags(), "--help"}), ("eval_gsm8k.sh", {*evaluation})):
        shown = [words for name in PAGES for words in re.findall(rf"{script}([^`#\n]*)", page(name))]
        assert len(shown) > 5
        assert {flag for words in shown for flag in re.findall(r"--\w+", words)} <= flags


def test_the_readme_is_short() -> None:
    assert len(page("README.md").encode()) <= 9000


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("demo", "docs/results.md"),
        ("demo-14-steps", "docs/results.md"),
        ("demo-short", "docs/results.md"),
        ("demo-vllm", "docs/results.md"),
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
    table = page("docs/gates.md").split(f"<!-- begin: {marker} -->")[1].split(f"<!-- end: {marker} -->")[0]
    assert table.strip() == page(f"benchmarks/results/{name}.md").strip()


def test_the_run_shown_in_the_readme_is_the_recorded_one() -> None:
    run = read_json(ROOT / "docs" / "results" / "demo" / "m3po-seed0.json")
    assert run is not None
    readme = page("README.md")
    assert f"{run['accuracy_before']:.1%}" in readme and f"{run['accuracy_after']:.1%}" in readme
    assert run["verdict"] in readme


def test_the_differences_in_the_readme_are_those_of_the_pages() -> None:
    rows = [
        line.split("|")[2:4]
        for line in page("README.md").splitlines()
        if re.search(r"\| -?[0-9.]+ to \+[0-9.]+ \|$", line)
    ]
    assert len(rows) == 5
    pages = "".join(page(f"docs/{name}.md") for name in ("results", "hyper-connections", "study"))
    for difference, interval in rows:
        number = difference.split()[0]
        assert re.search(rf"{re.escape(number)} [^:]*95 % interval {re.escape(interval.strip())}", pages)


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


def test_the_study_page_has_the_numbers_of_its_report() -> None:
    text, report = page("docs/study.md"), page("docs/results/gates/report.md")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if len(row) == 6 and row[0] != "variant"]
    assert len(rows) == 13
    for label, seeds, mean, difference, detectable, _ in rows:
        name = re.findall(r"`(.+)`", label)[0] + ("-0.1" if label.endswith("λ = 0.1") else "")
        runs = [read_json(path) or {} for path in RESULTS if re.fullmatch(rf"{re.escape(name)}-seed\d", path.stem)]
        after = {run["seed"]: run["accuracy_after"] for run in runs if "study" in run}
        assert seeds == " ".join(f"{100 * after[seed]:.0f}" for seed in sorted(after))
        assert f"| `{name}` | 5 | {mean} |" in report
        if name != "none":
            middle, interval = re.fullmatch(r"(\S+) \((.+)\)", difference).groups()  # type: ignore[union-attr]
            line = next(line for line in report.splitlines() if line.startswith(f"| `{name}` - `none` |"))
            assert line.startswith(f"| `{name}` - `none` | 5 | {middle} | {interval} |") and f"| {detectable} |" in line
    assert "F(6, 24) = 0.50, p = 0.8" in text and "F(6, 24) = 0.50, p = 0.8." in report
