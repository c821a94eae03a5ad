# SPDX-License-Identifier: Apache-2.0
"""A sweep keeps what is finished, resumes what was stopped, and compares like with like."""

import shutil
from pathlib import Path

import pytest

from m3po_lab.compare import comparison
from m3po_lab.config import UserError
from m3po_lab.files import read_json, write_json
from m3po_lab.sweep import main, mode_words, run_words


def test_a_run_starts_resumes_or_starts_anew_as_its_folder_says(finished_run: Path, tmp_path: Path) -> None:
    config, folder = Path("x.yaml"), tmp_path / "none-seed3"
    start = ["x.yaml", "--max_steps", "6", "--mode", "none", "--aslr_enabled", "false", "--seed", "3"]
    start += ["--output_dir", str(folder)]
    assert run_words(config, "none", 3, folder, ["--max_steps", "6"]) == start
    shutil.copytree(finished_run / "checkpoint-2", folder / "checkpoint-2")
    assert run_words(config, "none", 3, folder, ["--max_steps", "6"]) == [*start, "--resume_from_checkpoint", "true"]
    (folder / "checkpoint-2" / "trainer_state.json").unlink()
    assert run_words(config, "none", 3, folder, ["--max_steps", "6"]) == [*start, "--overwrite", "true"]


def test_sweep_goes_on_where_it_was_stopped_and_compares(
    finished_run: Path, tiny_config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One run finished, one stopped after two of six steps, one not begun; each in a process of its own."""
    shutil.copytree(finished_run, tmp_path / "none-seed3")
    finished = (tmp_path / "none-seed3" / "summary.json").stat().st_mtime_ns
    shutil.copytree(finished_run / "checkpoint-2", tmp_path / "none-seed4" / "checkpoint-2")
    words = [str(tiny_config), "--modes", "none", "--seeds", "3", "4", "--output_dir", str(tmp_path)]
    assert main(words) == 0
    printed = capfd.readouterr().out
    assert "run 1 of 2: mode none, seed 3: done before" in printed and "from checkpoint-2 into" in printed
    assert (tmp_path / "none-seed3" / "summary.json").stat().st_mtime_ns == finished
    table = (tmp_path / "comparison.md").read_text()
    assert [line.split("|")[2].strip() for line in table.splitlines() if line.startswith("| `none`")] == ["3", "4"]
    assert table.strip() in printed


def test_a_wrong_flag_stops_the_sweep_before_its_first_run(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_config), "--modes", "none", "hrpa", "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "mode='hrpa' is unknown" in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_start_accuracy_may_differ_where_the_residual_gate_is_fresh(finished_run: Path, tmp_path: Path) -> None:
    """Modes that decode plainly must have it in common: otherwise the runs have not begun with the same model."""
    summary = read_json(finished_run / "summary.json") or {}
    files = []
    for mode, before in (("none", 0.5), ("hrpo", 0.25), ("m3po", 0.5)):
        files.append(str(tmp_path / f"{mode}.json"))
        write_json(Path(files[-1]), {**summary, "mode": mode, "accuracy_before": before})
    assert "| `hrpo` | 3 | 0.250 |" in comparison(files)
    write_json(Path(files[2]), {**summary, "mode": "m3po", "accuracy_before": 0.25})
    with pytest.raises(UserError, match="differ in accuracy_before"):
        comparison(files)


def test_a_mode_with_aslr_is_one_of_its_own_in_flags_and_comparison(finished_run: Path, tmp_path: Path) -> None:
    assert mode_words("m3po+aslr") == ["--mode", "m3po", "--aslr_enabled", "true"]
    with pytest.raises(UserError, match="--modes m3po.alsr is unknown: give a mode, or a mode and .aslr"):
        mode_words("m3po+alsr")
    summary = read_json(finished_run / "summary.json") or {}
    write_json(tmp_path / "plain.json", summary)
    write_json(tmp_path / "aslr.json", summary | {"aslr_enabled": True})
    text = comparison([str(tmp_path / "plain.json"), str(tmp_path / "aslr.json")])
    assert "| `none` |" in text and "| `none+aslr` |" in text and "`none+aslr` against `none`: 1 common seeds" in text
