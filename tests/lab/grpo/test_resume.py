# SPDX-License-Identifier: Apache-2.0
"""A run interrupted at any moment and resumed ends with the weights of the uninterrupted run, bit for bit.

Completions are buffered over two steps here (num_iterations 2), so a resume that generated anew in the wrong place,
drew from another random state or skipped a row would show.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lab.conftest import H3PO
from safetensors.torch import load_file

from m3po_lab.core.files import read_json
from m3po_lab.grpo.checkpoints import checkpoints
from m3po_lab.train import main


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


def assert_same_weights(first: Path, second: Path) -> None:
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_training_moves_the_weights(finished_run: Path, tiny_model: Path) -> None:
    """Otherwise the comparisons below would compare the start with itself."""
    start = load_file(tiny_model / "model.safetensors")
    moved = [name for name, tensor in weights(finished_run).items() if not torch.equal(tensor, start[name])]
    assert len(moved) == len(start)


@pytest.mark.parametrize("mode", ["none", "h3po"])
def test_run_stopped_and_resumed_equals_uninterrupted_run(
    mode: str, finished_run: Path, h3po_run: Path, tiny_config: Path, tmp_path: Path
) -> None:
    """Two steps, then the rest with another process state."""
    words = [str(tiny_config), *(H3PO if mode == "h3po" else ())]
    whole = h3po_run if mode == "h3po" else finished_run
    parts = tmp_path / "parts"
    assert main([*words, "--output_dir", str(parts), "--max_steps", "2"]) == 0
    written = (parts / "checkpoint-2" / "model.safetensors").stat().st_mtime_ns
    torch.manual_seed(12345)
    random.seed(54321)
    assert main([*words, "--output_dir", str(parts), "--resume_from_checkpoint", "true"]) == 0
    assert_same_weights(whole, parts)
    assert (parts / "checkpoint-2" / "model.safetensors").stat().st_mtime_ns == written, "the run started anew"
    summary = read_json(parts / "summary.json")
    assert summary is not None
    assert summary["steps"] == 6
    assert [(part["from_step"], part["max_steps"]) for part in summary["parts"]] == [(0, 2), (2, 6)]
    assert summary["accuracy_after"] == (read_json(whole / "summary.json") or {})["accuracy_after"]


def test_finished_run_can_be_resumed_without_another_step(finished_run: Path, tiny_config: Path) -> None:
    before = weights(finished_run)
    words = [str(tiny_config), "--output_dir", str(finished_run), "--resume_from_checkpoint", "true"]
    assert main(words) == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(finished_run).items())
    assert (read_json(finished_run / "summary.json") or {})["steps"] == 6


def test_killed_run_resumes_to_the_same_weights(h3po_run: Path, tiny_config: Path, tmp_path: Path) -> None:
    """kill -9 at a random moment after the first checkpoint began to be written."""
    folder = tmp_path / "killed"
    words = [str(tiny_config), *H3PO, "--output_dir", str(folder)]
    delay = random.Random().uniform(0, 1.5)
    process = subprocess.Popen(
        [sys.executable, "-m", "m3po_lab.train", *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 240
    while not checkpoints(folder) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert checkpoints(folder), "the run wrote no checkpoint"
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    code = main([*words, "--resume_from_checkpoint", "true"])
    if code == 2:  # killed before the first checkpoint was whole: it starts anew
        assert main([*words, "--overwrite"]) == 0
    assert_same_weights(h3po_run, folder)


def test_interrupt_names_the_command_to_go_on(
    finished_run: Path, tiny_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*words: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("m3po_lab.grpo.session.run_session", interrupted)
    words = [str(tiny_config), "--output_dir", str(finished_run)]
    assert main(words) == 130
    printed = capsys.readouterr().err
    assert f"checkpoint-6 with: bash scripts/train_grpo.sh {' '.join(words)} --resume_from_checkpoint true" in printed


def test_a_disk_that_is_full_in_the_middle_is_one_line_that_says_how_to_go_on(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second checkpoint cannot be written; the first one is whole, and the run goes on from there."""
    save, run = torch.save, tmp_path / "run"

    def onto_a_full_disk(content: object, file: str, *rest: object) -> None:
        if "checkpoint-4" in str(file):
            Path(file).symlink_to("/dev/full")
        save(content, file, *rest)

    monkeypatch.setattr(torch, "save", onto_a_full_disk)
    words = [str(tiny_config), "--output_dir", str(run)]
    assert main(words) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]  # the progress bar is closed
    assert line.startswith("error: a file could not be written (") and "the disk is full: free some space" in line
    command = f"bash scripts/train_grpo.sh {tiny_config} --output_dir {run} --resume_from_checkpoint true"
    assert f"Continue from checkpoint-2 with: {command} Traceback: {run / 'error.log'}" in line
    assert "onto_a_full_disk" in (run / "error.log").read_text()
    monkeypatch.undo()
    assert main([*words, "--resume_from_checkpoint", "true"]) == 0
