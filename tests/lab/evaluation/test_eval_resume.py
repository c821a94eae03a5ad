# SPDX-License-Identifier: Apache-2.0
"""An evaluation that was stopped goes on behind its finished batches and ends as if it had not been."""

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval.models.huggingface import HFLM

from m3po_lab.eval_gsm8k import main
from m3po_lab.evaluation.folder import ABOUT_FILE, FinishedParts

REQUESTS = [("a", {"until": []}), ("b", {"until": []}), ("c", {"until": []})]
BATCHES = [[0, 1], [2]]


class Batches:
    """lm-eval's generation, counted, and stopped like by Ctrl-C at the batch `stop`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.stop = 0, -1
        generate = HFLM.generate_until

        def counting(lm: HFLM, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            if self.count == self.stop:
                raise KeyboardInterrupt
            self.count += 1
            return generate(lm, requests, disable_tqdm=disable_tqdm)

        monkeypatch.setattr(HFLM, "generate_until", counting)


@pytest.mark.parametrize("num_paths", [1, 2])
def test_stopped_evaluation_goes_on_with_the_same_completions(
    finished_run: Path,
    tmp_path: Path,
    num_paths: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    batches = Batches(monkeypatch)
    size = str(2 * num_paths)
    words = [str(finished_run / "final"), "--dataset", "problems", "--batch_size", size, "--num_paths", str(num_paths)]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main([*words, "--output_dir", str(whole)]) == 0
    assert batches.count == 3
    batches.count, batches.stop = 0, 2
    assert main([*words, "--output_dir", str(stopped)]) == 130
    assert "The same command goes on behind the batches that are done" in capsys.readouterr().err
    assert {path.name for path in stopped.iterdir()} == {"partial.jsonl", ABOUT_FILE}
    batches.count, batches.stop = 0, -1
    assert main([*words, "--output_dir", str(stopped)]) == 0
    assert batches.count == 1
    assert (stopped / "problems.jsonl").read_text() == (whole / "problems.jsonl").read_text()
    assert {path.name for path in stopped.iterdir()} == {ABOUT_FILE, "problems.jsonl", "results.json", "results.md"}


def test_other_settings_are_another_evaluation(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither its finished batches nor its results are taken, or written over."""
    batches = Batches(monkeypatch)
    words = [str(finished_run / "final"), "--dataset", "problems", "--batch_size", "3", "--output_dir", str(tmp_path)]
    batches.stop = 1
    assert main(words) == 130
    kept = (tmp_path / "partial.jsonl").read_text()
    batches.count, batches.stop = 0, -1
    capsys.readouterr()
    assert main([*words, "--dtype", "bfloat16"]) == 2
    line = f"--output_dir {tmp_path} has an evaluation with another dtype (float32, now bfloat16): give another."
    assert line in capsys.readouterr().err and (tmp_path / "partial.jsonl").read_text() == kept
    assert main(words) == 0 and batches.count == 1


@pytest.mark.parametrize(
    ("about", "requests", "batches"),
    [
        ("another model", REQUESTS, BATCHES),
        ("model", [*REQUESTS[:2], ("c", {"until": ["."]})], BATCHES),
        ("model", REQUESTS, [[0], [1, 2]]),
    ],
)
def test_batches_of_something_else_are_not_taken(tmp_path: Path, about: str, requests: Any, batches: Any) -> None:
    file = tmp_path / "partial.jsonl"
    first = FinishedParts(file, "model")
    assert first.read(REQUESTS, BATCHES) == []
    first.add(["x", "y"])
    assert FinishedParts(file, "model").read(REQUESTS, BATCHES) == [["x", "y"]]
    assert FinishedParts(file, about).read(requests, batches) == []
    assert FinishedParts(file, "model").read(REQUESTS, BATCHES) == []


def test_line_cut_short_by_a_kill_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "partial.jsonl"
    kept = FinishedParts(file, "model")
    kept.read(REQUESTS, BATCHES)
    kept.add(["x", "y"])
    file.write_text(file.read_text() + json.dumps(["z"])[:-2])
    assert kept.read(REQUESTS, BATCHES) == [["x", "y"]]
    kept.add(["z"])
    assert kept.read(REQUESTS, BATCHES) == [["x", "y"], ["z"]]
    kept.remove()
    assert kept.read(REQUESTS, BATCHES) == []
