# SPDX-License-Identifier: Apache-2.0
"""A study of toy runs: written down, killed, gone on with, and reported; runs that are none of it are refused."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from m3po_lab import train
from m3po_lab.core.errors import UserError
from m3po_lab.core.files import read_json, write_json
from m3po_lab.experiments.analyze_gating_results import main as analyze
from m3po_lab.experiments.run_m3po_experiment import main as run
from m3po_lab.study.measures import MEASURES, area_under_curve, steps_to_level
from m3po_lab.study.plan import check_study
from m3po_lab.study.planner import plan_lines

VARIANTS = {
    "none": {"mode": "none"},
    "baseline": {"mode": "m3po"},
    "uniform": {"mode": "m3po", "gating_type": "uniform"},
    "weak": {"mode": "m3po", "cross_path_lambda": 0.1},
}


def content(base: Path, **changes: Any) -> dict[str, Any]:
    """What the toy study's YAML says."""
    said = {
        "question": "Does it matter?",
        "decision_rule": "It does if anything differs.",
        "stop_rule": "All runs are run.",
        "base": str(base),
        "flags": {"cross_path_lambda": 0.5, "max_steps": 2, "num_iterations": 1, "answer_start": "9"},
        "variants": VARIANTS,
        "control": "none",
        "gates": ["baseline", "weak"],
        "placebos": ["uniform"],
        "seeds": [0, 1],
        "smallest_effect": 0.1,
        "accuracy_level": 0.5,
    }
    return {**said, **changes}


@pytest.fixture(scope="module")
def study_file(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("study") / "toy.yaml"
    flags = {**content(tiny_config)["flags"], "num_eval_paths": 2, "num_sampled_problems": 3}
    file.write_text(yaml.safe_dump(content(tiny_config, flags=flags), sort_keys=False))
    return file


def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are trained here, where everything is imported."""

    def trained(command: list[str], **_: Any) -> CompletedProcess[str]:
        assert command[1:3] == ["-m", "m3po_lab.train"]
        return CompletedProcess(command, train.main(command[3:]))

    monkeypatch.setattr("m3po_lab.study.runs.subprocess", SimpleNamespace(run=trained))


@pytest.fixture(scope="module")
def study_folder(study_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that was killed in its second run, with all it had started, and then gone on with to its end."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    words = [sys.executable, "-m", "m3po_lab.experiments.run_m3po_experiment", str(study_file)]
    process = subprocess.Popen([*words, "--output_dir", str(folder)], start_new_session=True)
    limit = time.monotonic() + 300
    while not (folder / "none-seed0" / "summary.json").exists() or not list(folder.glob("baseline*/run.json")):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "baseline-seed0" / "summary.json").exists()
    first = (folder / "none-seed0" / "summary.json").stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as monkeypatch:
        in_this_process(monkeypatch)
        assert run([str(study_file), "--output_dir", str(folder)]) == 0
    assert (folder / "none-seed0" / "summary.json").stat().st_mtime_ns == first, "a finished run is not run again"
    return folder


def test_a_dry_run_says_what_will_run_and_makes_nothing(
    study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run([str(study_file), "--dry-run", "--output_dir", str(tmp_path / "runs")]) == 0
    printed = capsys.readouterr().out
    assert "Does it matter?" in printed and "8 runs, 0 of them done; what a run costs is not known" in printed
    names = re.findall(r"^(\S+-seed\d)  ", printed, re.MULTILINE)
    assert names == [f"{variant}-seed{seed}" for seed in (0, 1) for variant in VARIANTS]
    assert "--cross_path_lambda=0.5" not in next(line for line in printed.splitlines() if line.startswith("none-"))
    assert not (tmp_path / "runs").exists()


def test_each_run_knows_its_study_and_its_data_order_goes_by_the_seed(study_folder: Path):
    stored = read_json(study_folder / "study.json") or {}
    assert len(stored["runs"]) == 8
    for name, planned in stored["runs"].items():
        summary = read_json(study_folder / name / "summary.json") or {}
        assert (summary["study"], summary["code"]) == (stored["digest"], stored["code"])
        assert summary["seed"] == planned["seed"]
        assert summary["flags"]["problem_seed"] == 7 + 100_000 * planned["seed"]
        assert len(summary["correct_after"]) == 6
        assert summary["sampled"]["num_problems"] == 3 and summary["sampled"]["num_paths"] == 2
        assert (study_folder / name / "samples.jsonl").read_text().count("\n") == 3
        assert {place.name for place in (study_folder / name).iterdir() if place.is_dir()} == {"final"}


def test_the_report_answers_and_needs_no_other_file(study_folder: Path, capsys: pytest.CaptureFixture[str]):
    assert analyze([str(study_folder)]) == 0
    answer = capsys.readouterr().out
    text = (study_folder / "report.md").read_text()
    assert text.startswith("# Does it matter?") and "All runs of the plan are in this report." in text
    assert "Of 6 comparisons" in answer and "Interim" not in answer
    for part in ("It does if anything differs.", "| `none` |", "`weak` - `none`", "p(Holm)", "train_grpo.sh"):
        assert part in text
    page = (study_folder / "report.html").read_text()
    assert page.count('src="data:image/svg+xml;base64,') == 5 and not re.search(r'(src|href)="https?:', page)
    drawn = {file.name for file in (study_folder / "figures").iterdir()}
    names = ("levels", "differences", "curves", "attention", "dose")
    assert drawn == {f"{name}.{ending}" for name in names for ending in ("png", "svg")}


def test_a_report_on_copied_summaries_is_the_same_but_for_its_links(study_folder: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(study_folder / "study.json", copy)
    for place in study_folder.glob("*-seed*"):
        shutil.copy(place / "summary.json", copy / f"{place.name}.json")
    assert analyze([str(copy)]) == 0 and analyze([str(study_folder)]) == 0
    table = (copy / "report.md").read_text().partition("## Runs")[0]
    assert table == (study_folder / "report.md").read_text().partition("## Runs")[0]
    drawn = sorted((copy / "figures").glob("*.svg"))
    assert len(drawn) == 5
    assert all(file.read_bytes() == (study_folder / "figures" / file.name).read_bytes() for file in drawn)
    (copy / "weak-seed1.json").unlink()
    assert analyze([str(copy)]) == 0
    assert "**Interim: 1 of 8 runs are missing" in (copy / "report.md").read_text()


def test_a_run_that_is_none_of_the_studys_is_refused_by_its_name(
    study_file: Path, study_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = Path(shutil.copytree(study_folder, tmp_path / "copy"))
    summary_file = folder / "weak-seed1" / "summary.json"
    summary = read_json(summary_file) or {}

    def refused(named: str) -> None:
        for command in (analyze, run):
            words = [str(folder)] if command is analyze else [str(study_file), "--output_dir", str(folder)]
            assert command(words) == 2
            assert named in capsys.readouterr().err

    write_json(summary_file, {**summary, "flags": {**summary["flags"], "learning_rate": 0.5}})
    refused("weak-seed1 was run with --learning_rate 0.5, the study has 0.01")
    write_json(summary_file, {**summary, "code": "other"})
    refused("weak-seed1 was run by other code")
    write_json(summary_file, {**summary, "study": "other"})
    refused("weak-seed1 was run for another study")
    write_json(summary_file, summary)
    shutil.copytree(folder / "weak-seed1", folder / "weak-seed7")
    refused("weak-seed7 is no run of this study")
    shutil.rmtree(folder / "weak-seed7")
    write_json(folder / "weak-seed8.json", summary)
    refused("weak-seed8 is no run of this study")


def test_another_study_or_other_code_does_not_go_on_in_the_folder(
    tiny_config: Path, study_file: Path, study_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = tmp_path / "toy.yaml"
    said = yaml.safe_load(study_file.read_text())
    other.write_text(yaml.safe_dump({**said, "smallest_effect": 0.2}, sort_keys=False))
    assert run([str(other), "--output_dir", str(study_folder)]) == 2
    assert "a study with another smallest_effect" in capsys.readouterr().err
    folder = tmp_path / "begun"
    stored = read_json(study_folder / "study.json") or {}
    write_json(folder / "study.json", {**stored, "code": "other"})
    assert run([str(study_file), "--output_dir", str(folder)]) == 2
    assert "was begun with other code" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"question": None}, "question is missing"),
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"control": "plain"}, "'plain' is none of the variants"),
        ({"comparisons": [["none", "strong"]]}, "'strong' is none of the variants"),
        ({"comparisons": [["none"]]}, "comparisons are pairs"),
        ({"variants": {"none": {"mode": "none"}}}, "two at least"),
        ({"seeds": [1]}, "two different ones"),
        ({"seeds": [1, 1]}, "two different ones"),
        ({"smallest_effect": 0}, "above 0"),
        ({"primary_measure": "beauty"}, "none of accuracy"),
    ],
)
def test_a_wrong_study_is_refused_in_one_line(changes: dict[str, Any], words: str, tiny_config: Path):
    said = {name: value for name, value in content(tiny_config, **changes).items() if value is not None}
    with pytest.raises(UserError, match=words):
        check_study("toy.yaml", said)


@pytest.mark.parametrize(
    ("variants", "words"),
    [
        ({"none": {"mode": "none"}, "two": {"mode": "none", "seed": 4}}, "variant two: seed is the study's to set"),
        ({"none": {"mode": "none"}, "two": {"mode": "none"}}, "variants none and two are the same run"),
        ({"none": {"mode": "none"}, "two": {"mode": "m4po"}}, "m4po"),
    ],
)
def test_a_wrong_variant_is_refused_before_any_run(
    variants: dict[str, Any], words: str, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "toy.yaml"
    said = content(tiny_config, variants=variants, gates=["two"], placebos=[])
    file.write_text(yaml.safe_dump(said, sort_keys=False))
    assert run([str(file), "--output_dir", str(tmp_path / "runs")]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_measures_of_a_run_by_hand():
    history = {"step": [1, 2, 3, 4], "accuracy": [0.0, 0.2, 0.4, 0.6], "entropy": [4.0, 3.0, 2.0, 1.0]}
    summary = {"history": {**history, "blend_kl": [0.5, None, 0.25, None]}, "sampled": None}
    assert area_under_curve(summary) == pytest.approx((0.1 + 0.3 + 0.5) / 3)
    assert (
        steps_to_level(summary, 0.2) == 3 and steps_to_level(summary, 0.39) == 4 and steps_to_level(summary, 0.5) == 5
    )
    assert MEASURES["entropy_last"].of(summary) == 1.0
    assert MEASURES["blend_kl"].of(summary) == 0.375 and MEASURES["pass_at_n"].of(summary) is None


def test_the_planner_says_how_many_seeds_the_smallest_effect_needs(tiny_config: Path):
    study = check_study("toy.yaml", content(tiny_config, smallest_effect=0.03))

    def pilot(mode: str, seed: int, accuracy: float) -> dict[str, Any]:
        return {"flags": {"mode": mode}, "seed": seed, "accuracy_after": accuracy}

    # The differences of the demo's first three pairs scatter by 3.7 points, which wants 14 seeds for 3 points.
    pilots = [pilot("none", seed, 0.5) for seed in range(3)]
    pilots += [pilot("m3po", seed, 0.5 + difference) for seed, difference in enumerate((-0.047, -0.056, 0.012))]
    lines = "\n".join(plan_lines(study, pilots))
    assert "scatters by 3.7 points" in lines and "14 seeds find a difference of 3.0 points" in lines
    assert "how seeds scatter is not known" in plan_lines(study, pilots[:3])[0]
