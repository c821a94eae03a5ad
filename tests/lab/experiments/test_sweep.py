# SPDX-License-Identifier: Apache-2.0
"""A sweep keeps what is finished, resumes what was stopped, and compares like with like."""

import shutil
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import pytest
from transformers.m3po.gating import list_gating_functions, list_placebos

from m3po_lab import train
from m3po_lab.core.errors import UserError
from m3po_lab.core.files import read_json, write_json
from m3po_lab.core.identity import RUN_FILE, folder_of
from m3po_lab.experiments.comparison import comparison
from m3po_lab.experiments.sweep import mode_words, run_words, variants
from m3po_lab.grpo.report import ATTENTION
from m3po_lab.sweep import main


@pytest.fixture
def trained_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are trained in this process, which has imported everything; a sweep that goes on starts a real one."""

    def run(command: list[str], check: bool) -> CompletedProcess[str]:
        assert command[1:3] == ["-m", "m3po_lab.train"]
        return CompletedProcess(command, train.main(command[3:]))

    monkeypatch.setattr("m3po_lab.experiments.runs.subprocess", SimpleNamespace(run=run))


def test_a_run_starts_resumes_or_starts_anew_as_its_folder_says(finished_run: Path, tmp_path: Path) -> None:
    config, folder = Path("x.yaml"), tmp_path / "none-seed3"
    start = ["x.yaml", "--max_steps", "6", "--mode", "none", "--aslr_enabled", "false", "--seed", "3"]
    start += ["--output_dir", str(folder)]
    assert run_words(config, ["--max_steps", "6", *mode_words("none")], 3, folder) == start
    shutil.copytree(finished_run / "checkpoint-2", folder / "checkpoint-2")
    assert run_words(config, ["--max_steps", "6", *mode_words("none")], 3, folder) == [
        *start,
        "--resume_from_checkpoint",
        "true",
    ]
    (folder / "checkpoint-2" / "trainer_state.json").unlink()
    assert run_words(config, ["--max_steps", "6", *mode_words("none")], 3, folder) == [*start, "--overwrite", "true"]


def test_sweep_goes_on_where_it_was_stopped_and_compares(
    finished_run: Path, tiny_config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One run finished, one stopped after two of six steps, one not begun; each in a process of its own."""
    shutil.copytree(finished_run, tmp_path / "none-seed3")
    finished = (tmp_path / "none-seed3" / "summary.json").stat().st_mtime_ns
    stopped = Path(shutil.copytree(finished_run / "checkpoint-2", tmp_path / "none-seed4" / "checkpoint-2"))
    told = read_json(stopped / RUN_FILE) or {}
    write_json(stopped / RUN_FILE, {**told, "flags": {**told["flags"], "seed": 4}})
    words = [str(tiny_config), "--modes", "none", "--seeds", "3", "4", "--output_dir", str(tmp_path)]
    assert main([*words, "--learning_rate", "1e-3"]) == 2  # neither is taken for a run of these flags
    assert "--learning_rate 0.001: " in capfd.readouterr().err
    assert main(words) == 0
    printed = capfd.readouterr().out
    assert "run 1 of 2: mode none, seed 3: done before" in printed and "from checkpoint-2 into" in printed
    assert (tmp_path / "none-seed3" / "summary.json").stat().st_mtime_ns == finished
    table = (tmp_path / "comparison.md").read_text()
    rows = table.split("\n\n")[0].splitlines()[2:]
    assert [row.split("|")[1:3] for row in rows] == [[" `none` ", f" {seed} "] for seed in (3, 4)]
    assert table.strip() in printed


@pytest.mark.parametrize("kept", ["both", "report", "checkpoint"])
def test_a_run_of_other_flags_is_not_taken_as_done_or_resumed(
    kept: str, finished_run: Path, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything runs, whichever of the runs it is; a report of before there was `run.json` by what it says."""
    place = Path(shutil.copytree(finished_run, tmp_path / "none-seed3"))
    if kept == "report":
        (place / RUN_FILE).unlink()
        summary = read_json(place / "summary.json") or {}
        write_json(place / "summary.json", {key: summary[key] for key in summary if key not in ("flags", "parts")})
    if kept == "checkpoint":
        (place / "summary.json").unlink()
    words = [str(tiny_config), "--modes", "none", "--output_dir", str(tmp_path)]
    assert main([*words, "--seeds", "7", "3", "--temperature", "0.9"]) == 2
    line = f"--temperature 0.9: {place} has a run with 1.0; set that, or give another --output_dir."
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["none-seed3"]
    if kept != "checkpoint":
        assert main([*words, "--seeds", "3"]) == 0
        told = "has no run.json: compared by its summary.json, without the content of files" in capsys.readouterr().out
        assert told == (kept == "report")


@pytest.mark.parametrize("word", ["--seed", "--mode=none", "--aslr-enabled", "--overwrite", "--resume_from_checkpoint"])
def test_a_flag_that_the_sweep_sets_is_not_dropped_without_a_word(
    word: str, tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_config), "--modes", "none", word, "true"]) == 2
    assert f"{word} is what the runs of a sweep differ in" in capsys.readouterr().err


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
        flags = {**summary["flags"], "mode": mode}
        write_json(Path(files[-1]), {**summary, "mode": mode, "flags": flags, "accuracy_before": before})
    assert "| `hrpo` | 3 | 0.250 |" in comparison(files)
    write_json(Path(files[2]), {**(read_json(Path(files[2])) or {}), "accuracy_before": 0.25})
    with pytest.raises(UserError, match="differ in accuracy_before"):
        comparison(files)


def test_a_mode_with_aslr_is_one_of_its_own_in_flags_and_comparison(finished_run: Path, tmp_path: Path) -> None:
    assert mode_words("m3po+aslr") == ["--mode", "m3po", "--aslr_enabled", "true"]
    with pytest.raises(
        UserError, match="--modes m3po.alsr is unknown: give a mode, or with gating function and ASLR m3po:raw_dot"
    ):
        mode_words("m3po+alsr")
    summary = read_json(finished_run / "summary.json") or {}
    write_json(tmp_path / "plain.json", summary)
    write_json(tmp_path / "aslr.json", {**summary, "flags": {**summary["flags"], "aslr_enabled": True}})
    text = comparison([str(tmp_path / "plain.json"), str(tmp_path / "aslr.json")])
    assert "| `none` |" in text and "| `none+aslr` |" in text and "`none+aslr` against `none`: 1 common seeds" in text


def test_a_gate_is_named_behind_a_colon() -> None:
    gate = ["--gating_type", "kl_divergence"]
    assert mode_words("m3po:kl_divergence") == ["--mode", "m3po", *gate, "--aslr_enabled", "false"]
    assert mode_words("h3po:kl_divergence+aslr") == ["--mode", "h3po", *gate, "--aslr_enabled", "true"]
    assert "--gating_type" not in mode_words("m3po")  # that of the config, or of the user's own flag


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["--modes", "none:raw_dot"],
            "--modes none:raw_dot: only m3po and h3po have a gating function; leave out :raw_dot.",
        ),
        (
            ["--modes", "hrpo:raw_dot"],
            "--modes hrpo:raw_dot: only m3po and h3po have a gating function; leave out :raw_dot.",
        ),
        (["--modes", "m3po:"], "--modes m3po: is unknown: give a mode"),
        (["--modes", "m3po", "m3po:baseline"], "--modes m3po and m3po:baseline are the same here"),
        (["--modes", "none", "--gates"], "--gates and --modes exclude each other"),
        (
            ["--gates", "raw_dott"],
            f"'raw_dott' is unknown; set one of {', '.join([*list_gating_functions(), *list_placebos()])}.",
        ),
    ],
)
def test_a_wrong_gate_is_one_line_before_the_first_run(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    assert main([str(tiny_config), "--output_dir", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_gates_without_names_are_all_of_them_and_the_control(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    monkeypatch.setattr("m3po_lab.experiments.sweep.run_sweep", lambda *given: called.append(given) or 0)
    assert main([str(tiny_config), "--gates"]) == 0 and main([str(tiny_config)]) == 0
    (_, gates, _, gates_folder), (_, modes, _, modes_folder) = called
    assert list(gates) == ["none", *(f"m3po:{name}" for name in list_gating_functions())] and len(gates) >= 6
    assert list(modes) == ["none", "m3po", "hrpo", "h3po"]
    assert (gates_folder.name, modes_folder.name) == ("sweep-gates-tiny", "sweep-tiny")


def test_the_value_of_a_flag_of_the_runs_is_not_taken_for_the_yaml(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    monkeypatch.setattr("m3po_lab.experiments.sweep.run_sweep", lambda *given: called.append(given) or 0)
    assert main(["--max_steps", "2", "--gates"]) == 0 and main([str(tiny_config), "--max_steps", "2"]) == 0
    assert [config.name for config, *_ in called] == ["demo_short.yaml", tiny_config.name]
    assert all(words[:2] == ["--max_steps", "2"] for _, found, *_ in called for words in found.values())


def test_a_gate_is_trained_and_compared_with_the_control_that_is_there(
    trained_here: None, finished_run: Path, tiny_config: Path
) -> None:
    folder = finished_run.parent / "gates"
    shutil.copytree(finished_run, folder / "none-seed3")
    words = [str(tiny_config), "--gates", "raw_dot", "--seeds", "3", "--output_dir", str(folder)]
    assert main(words) == 0
    made = sorted(path.name for path in folder.iterdir())
    assert made == ["comparison.md", "m3po-raw_dot-seed3", "none-seed3", "start_evaluations"]
    summary = read_json(folder / "m3po-raw_dot-seed3" / "summary.json") or {}
    assert (summary["mode"], summary["gating_type"]) == ("m3po", "raw_dot")
    assert set(summary["attention"]) == set(ATTENTION) and 0 < summary["attention"]["attention_max"] <= 1
    control, gate = (folder / "comparison.md").read_text().split("\n\n")[1].splitlines()[2:]
    assert control.startswith("| `none` | 1 | ") and "| - | - | - | - |" in control
    assert gate.startswith("| `m3po:raw_dot` | 1 | ") and f"| {summary['attention']['attention_entropy']:.3f} |" in gate


CONFIG = Path("configs/demo_short.yaml")


def test_axes_are_varied_in_the_modes_that_have_them_and_multiply() -> None:
    modes = ["none", "m3po", "hrpo"]
    found = variants(CONFIG, modes, ["cross_path_lambda=0,0.3", "temperature=0.7,1.0", "thought_top_k=8,16"], [])
    assert list(found) == [
        *("none temperature=0.7", "none temperature=1.0"),
        *(f"m3po cross_path_lambda={share} temperature={heat}" for share in ("0", "0.3") for heat in ("0.7", "1.0")),
        *(f"hrpo temperature={heat} thought_top_k={kept}" for heat in ("0.7", "1.0") for kept in (8, 16)),
    ]
    last = found["m3po cross_path_lambda=0.3 temperature=1.0"]
    assert last == [*mode_words("m3po"), "--cross_path_lambda=0.3", "--temperature=1.0"]
    gates = variants(CONFIG, ["m3po"], ["gating_type=baseline,luong", "gating_learning_rate=0.1,0.01"], [])
    assert len(gates) == 3  # the baseline does not learn
    options = variants(
        CONFIG, ["m3po:luong"], ['gating_config={"rank": 4},{"rank": 8, "project_embeddings": true}'], []
    )
    assert len({folder_of(told, 0) for told in options}) == 2 and all("{" not in folder_of(told, 0) for told in options)
    assert folder_of("m3po:raw_dot cross_path_lambda=0.3", 1) == "m3po-raw_dot-cross_path_lambda-0.3-seed1"
    assert folder_of("none answer_start=A b", 0) != folder_of("none answer_start=A/b", 0)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["--modes", "none", "hrpo"],
            "--axis cross_path_lambda: none of the modes none, hrpo has that flag; leave it out",
        ),
        (["--axis", "cross_path_lamda=0,1"], "Unknown argument --cross_path_lamda. Did you mean --cross_path_lambda?"),
        (["--axis", "cross_path_phase=all,some"], "cross_path_phase='some' is unknown"),
        (["--axis", "temperature=1,1.0"], "are the same here: leave out one of them."),
        (["--axis", "temperature"], "--axis temperature: give a flag and its different values"),
        (["--axis", "temperature=1,,2"], "--axis temperature=1,,2: give a flag and its different values"),
        (["--axis", "seed=1,2"], "--axis seed=1,2: a sweep sets --seed itself; see --modes and --seeds."),
        (["--axis", "dataset=a,b"], "runs are compared on the same problems, model and number of steps"),
        (["--axis", "save-steps=2,4"], "--save_steps changes no number of a run"),
        (["--cross-path-lambda", "0.2"], "--cross-path-lambda is what the runs of a sweep differ in"),
    ],
)
def test_a_wrong_axis_is_one_line_before_the_first_run(
    words: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(CONFIG), "--axis", "cross_path_lambda=0,0.3", "--output_dir", str(tmp_path / "out"), *words]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_an_axis_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr("m3po_lab.experiments.sweep.run_sweep", lambda *given: called.append(given) or 0)
    assert main([str(CONFIG), "--modes", "none", "m3po", "--axis", "cross_path_phase=thinking,all"]) == 0
    _, found, _, folder = called[0]
    assert folder.name == "sweep-cross_path_phase-demo_short"
    assert list(found) == ["none", "m3po cross_path_phase=thinking", "m3po cross_path_phase=all"]


def test_an_axis_is_trained_and_compared_by_its_short_name(
    trained_here: None, finished_run: Path, tiny_config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The second run finds the start model evaluated."""
    shutil.copytree(finished_run, tmp_path / "none-seed3")
    words = [str(tiny_config), "--modes", "none", "m3po", "--axis", "cross_path_lambda=0.1,0.3", "--seeds", "3"]
    assert main([*words, "--output_dir", str(tmp_path)]) == 0
    table = (tmp_path / "comparison.md").read_text()
    assert all(f"| `{name}` | 3 |" in table for name in ("none", "m3po λ=0.1", "m3po λ=0.3"))
    summary = read_json(tmp_path / "m3po-cross_path_lambda-0.3-seed3" / "summary.json") or {}
    assert summary["flags"]["cross_path_lambda"] == 0.3 and summary["diversity"]["distinct_answers_first"] > 0
    assert f"| `m3po λ=0.3` | 1 | {summary['diversity']['distinct_answers_first']:.3f} | " in table
    printed = capfd.readouterr()
    assert printed.out.count("the start model was evaluated before") == 1
    assert printed.err.count("held-out, before: 100%") == 1 < printed.err.count("held-out, after: 100%")
