# SPDX-License-Identifier: Apache-2.0
"""The evaluation script: it agrees with the report of a run, and refuses what contradicts the checkpoint."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from m3po_lab.core.files import read_json
from m3po_lab.eval_gsm8k import main
from m3po_lab.evaluation import datasets
from m3po_lab.evaluation.agreement import agreement

SHORT = ("--dataset", "problems", "--batch_size", "6")


def samples(folder: Path, task: str = "problems") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]


@pytest.fixture
def cross_path_checkpoint(finished_run: Path, tmp_path: Path) -> Path:
    """The trained model as a checkpoint of mode m3po whose paths listen to the end."""
    folder = Path(shutil.copytree(finished_run / "final", tmp_path / "run" / "final"))
    numbers = json.loads((folder / "m3po.json").read_text())
    numbers |= {"mode": "m3po", "cross_path_lambda": 0.3, "cross_path_temp": 0.2, "cross_path_phase": "all"}
    (folder / "m3po.json").write_text(json.dumps(numbers | {"gating_type": "baseline", "gating_config": {}}))
    return folder


def test_trained_and_start_model_agree_with_the_report_of_the_run(
    finished_run: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Same problems, prompt, marker, lengths and rule: found again from the checkpoint alone."""
    report = [json.loads(line) for line in (finished_run / "completions.jsonl").read_text().splitlines()]
    final, before = finished_run / "final", tmp_path / "before"
    assert main([str(final), *SHORT, "--output_dir", str(tmp_path / "after")]) == 0
    assert main([str(tiny_model), *SHORT, "--problems_of", str(final), "--output_dir", str(before)]) == 0
    for folder, text, verdict in ((tmp_path / "after", "after", "correct"), (before, "before", "correct_before")):
        found = samples(folder)
        assert [row["question"] for row in found] == [row["question"] for row in report]
        assert [row["completions"] for row in found] == [[row[text]] for row in report]
        assert [row["strict_match"] == 1.0 for row in found] == [row[verdict] for row in report]
    summary, results = read_json(finished_run / "summary.json"), read_json(tmp_path / "after" / "results.json")
    assert summary is not None and results is not None
    assert results["results"]["problems"]["strict_match,all"] == summary["accuracy_after"]
    assert results["results"]["problems"]["well_formed,all"] == summary["format_after"]
    same = {"run": str(finished_run), "problems": 6, "same_verdict": 6, "same_completion": 6}
    assert results["agreement"] == {**same, "training": "after"}
    told = read_json(before / "results.json")
    assert told is not None and told["agreement"] == {**same, "training": "before"}


def test_disagreement_with_the_report_is_counted_and_said(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A comparison that finds everything equal whatever it reads would prove nothing."""
    run = Path(shutil.copytree(finished_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*")))
    lines = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    lines[0]["after"] += " changed"
    lines[1]["correct"] = not lines[1]["correct"]
    (run / "completions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    assert main([str(run / "final"), *SHORT, "--limit", "4", "--output_dir", str(out)]) == 0
    line = f"report of {run}, after training: the same verdict on 3 and the same text for 3 of 4 problems"
    assert line in capsys.readouterr().out and line in (out / "results.md").read_text()
    lines[3]["question"] = "another"
    (run / "completions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main([str(run / "final"), *SHORT, "--limit", "4", "--output_dir", str(out)]) == 0
    results = read_json(out / "results.json")
    assert results is not None and results["agreement"] is None


def test_only_the_start_and_the_final_model_are_compared_with_the_report(finished_run: Path, tiny_model: Path) -> None:
    final = str(finished_run / "final")
    sample = {"doc": {"question": "?"}, "strict_match": 1.0, "resps": [["x"]]}
    assert agreement(final, None, []) is not None
    assert agreement(str(tiny_model), final, []) is not None
    for model, problems_of, samples in (
        (str(finished_run / "checkpoint-6"), None, []),
        (str(finished_run / "checkpoint-6"), final, []),
        (str(tiny_model), None, []),
        (final, None, [sample] * 7),
    ):
        assert agreement(model, problems_of, samples) is None


def test_every_checkpoint_of_a_run_carries_its_evaluation_settings(finished_run: Path) -> None:
    written = {path.parent.name: path.read_text() for path in finished_run.rglob("evaluation.json")}
    assert sorted(written) == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "final"]
    assert len(set(written.values())) == 1
    assert json.loads(written["final"])["prompt_template"] == "What is {expression} ?"


def test_report_of_an_evaluation(
    cross_path_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(cross_path_checkpoint), *SHORT, "--limit", "3", "--output_dir", str(tmp_path / "out")]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "mode m3po (lambda=0.3, temperature=0.2, gating_type=baseline, phase=all, answer marker '####')" in printed
    assert "evaluated plain, one path: the mode acts in training only (M3PO paper, section 6), greedy" in printed
    assert "datasets as asked for: problems; problems: those of the run, reasoning-gym:chain_sum" in printed
    assert "| problems | 1.1 | 0 | 3 | " in printed and " ± " in printed
    assert (tmp_path / "out" / "results.md").read_text().splitlines()[2:] == [
        line for line in printed.splitlines() if line.startswith("|")
    ]
    results = read_json(tmp_path / "out" / "results.json")
    assert results is not None
    assert (results["checkpoint"]["cross_path_lambda"], results["versions"]) == (0.3, {"problems": 1.1})


@pytest.mark.parametrize("mode", ["none", "m3po"])
def test_paths_are_voted_on(
    mode: str,
    finished_run: Path,
    cross_path_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = cross_path_checkpoint if mode == "m3po" else finished_run / "final"
    for name in ("once", "again"):
        words = [str(model), *SHORT, "--num_paths", "4", "--seed", "5", "--output_dir", str(tmp_path / name)]
        assert main(words) == 0
    kind = "a cross-path group" if mode == "m3po" else "independent samples"
    printed = capsys.readouterr().out
    assert f"4 paths of each problem as {kind}, sampling temperature 1" in printed
    assert "strict match, mean of paths" in printed and "| majority@4 | pass@4 |" in printed
    found = samples(tmp_path / "once")
    assert [len(row["completions"]) for row in found] == [4] * 6
    assert all(row["pass_at_n"] >= max(row["majority_vote"], row["strict_match"]) for row in found)
    assert found == samples(tmp_path / "again")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--mode", "none"], "--mode none: .*m3po.json says mode m3po .*leave the flag out"),
        (["--cross_path_lambda", "0.1"], "--cross_path_lambda 0.1: .*says mode m3po with cross_path_lambda 0.3"),
        (["--cross_path_temp", "0.1"], "--cross_path_temp 0.1: .*cross_path_temp 0.2"),
        (["--sampling_temperature", "0.5"], "--sampling_temperature 0.5: .*sampling_temperature 1.0"),
        (["--answer_start", "A:"], "--answer_start A:: .*answer_start ####"),
        (["--limit", "0"], "--limit 0: it must be at least 1"),
        (["--num_paths", "0"], "--num_paths 0: it must be at least 1"),
        (["--num_fewshot", "5"], "--num_fewshot: invalid choice: 5"),
        (["--num_fewshot", "8"], "--num_fewshot 8: problems has no solved examples"),
        (["--dataset", "gsm9k"], "--dataset gsm9k is unknown: give openai/gsm8k"),
        (["--dataset", "a.jsonl", "--dataset", "b.jsonl"], "two of them are one task; evaluate them one by one"),
        (["--dataset", "no.jsonl"], "--dataset no.jsonl does not exist"),
        (["--problems_of", "runs/none"], "--problems_of runs/none has no evaluation.json"),
        (["--numpaths", "8"], "unrecognized arguments: --numpaths 8"),
    ],
)
def test_contradiction_or_wrong_input_is_one_line(
    words: list[str], text: str, cross_path_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(cross_path_checkpoint), "--dataset", "problems"]
    assert main([*given, *words]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert printed.startswith("error: ")
    assert re.search(text, printed), printed


def test_flags_that_agree_with_the_checkpoint_are_taken(cross_path_checkpoint: Path, tmp_path: Path) -> None:
    words = [*SHORT, "--limit", "1", "--mode", "m3po", "--cross_path_lambda", "0.3", "--output_dir", str(tmp_path)]
    assert main([str(cross_path_checkpoint), *words]) == 0


def test_numbers_of_a_plain_model_come_from_the_flags(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiny_model), "--cross_path_lambda", "0.1"]) == 2
    assert "--cross_path_lambda goes with --mode m3po" in capsys.readouterr().err
    assert main([str(tiny_model), "--mode", "m3po", "--cross_path_lambda", "2", "--num_paths", "4"]) == 2
    assert "--cross_path_lambda=2.0 is outside [0, 1]" in capsys.readouterr().err
    assert main([str(tiny_model), "--mode", "hrpa"]) == 2
    assert "mode hrpa is unknown here; the modes are none, m3po, hrpo, h3po" in capsys.readouterr().err


def test_folder_of_a_run_is_not_taken_for_a_checkpoint(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(finished_run), "--dataset", "problems"]) == 2
    assert "is the folder of a run: give one of its checkpoints" in capsys.readouterr().err
    assert main(["./no/such/model", "--dataset", "problems"]) == 2
    assert capsys.readouterr().err.startswith("error: ./no/such/model is not a model folder")


def test_dataset_is_chosen_openly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the Hub generated problems take GSM8K's place, and the line says so and why."""
    monkeypatch.setattr(datasets, "hub_error", lambda: None)
    assert datasets.choose([], 0) == (["openai/gsm8k"], "no --dataset is given: openai/gsm8k from the Hub")
    monkeypatch.setattr(datasets, "hub_error", lambda: "no route")
    names, reason = datasets.choose([], 0)
    assert names == ["gsm_symbolic", "problems"]
    assert "the Hub cannot be reached (no route): generated gsm_symbolic and problems" in reason
    assert datasets.choose([], 8)[0] == ["gsm_symbolic"]
    assert datasets.choose(["openai/gsm8k"], 0)[0] == ["openai/gsm8k"]


def test_two_checkpoints_of_one_name_do_not_share_a_folder(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor does one that was trained anew, and what a folder holds is not written over."""
    monkeypatch.setattr("m3po_lab.evaluation.folder.PROJECT_ROOT", tmp_path)
    places = [tmp_path / name / "run" / "final" for name in ("one", "other")]
    for place in places:
        shutil.copytree(finished_run / "final", place)
        assert main([str(place), *SHORT, "--limit", "1"]) == 0
    assert main([str(places[0]), *SHORT, "--limit", "1"]) == 0  # the same again
    folders = sorted((tmp_path / "evals").iterdir())
    assert len(folders) == 2 and all(folder.name.startswith("run-final-problems-limit1-") for folder in folders)
    file = places[0] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert main([str(places[0]), *SHORT, "--limit", "1"]) == 0
    assert main([str(places[0]), *SHORT, "--limit", "1", "--seed", "1", "--num_paths", "2"]) == 0
    assert len(list((tmp_path / "evals").iterdir())) == 4
    capsys.readouterr()
    before = (folders[0] / "results.json").read_text()
    assert main([str(places[0]), *SHORT, "--limit", "2", "--output_dir", str(folders[0])]) == 2
    assert "has an evaluation with another" in capsys.readouterr().err
    (folders[0] / "evaluation_of.json").unlink()  # results of before there was such a file
    assert main([str(places[0]), *SHORT, "--limit", "1", "--output_dir", str(folders[0])]) == 2
    assert "has results.json and no evaluation_of.json that says of what: give another." in capsys.readouterr().err
    assert (folders[0] / "results.json").read_text() == before


def test_hub_that_is_switched_off_is_an_answer_and_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert datasets.hub_error() is not None
