# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/engines.py` without a GPU: the dry run, the steps of one engine for real, the tables, what is kept.

Unsloth's two processes need a GPU; benchmarks/results has what one gave.
"""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
SMALL = ["--modes", "none", "h3po", "--prompts", "2", "--paths", "2", "--length", "3", "--rounds", "1"]
SMALL += ["--warmup", "1", "--steps", "2"]


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("engines")
    monkeypatch.setattr(module, "CACHE", tmp_path / "cache")
    return module


def test_a_dry_run_makes_what_needs_no_gpu_and_says_what_it_would_run(
    engines: Any, tiny_model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert engines.main(["--dry-run", "--model_name_or_path", str(tiny_model), *SMALL]) == 0
    printed = capsys.readouterr().out
    for engine in engines.ENGINES:
        assert f"engine_steps.py {engine} " in printed
    assert "mode h3po: h3po" in printed
    pristine = tmp_path / "cache" / "pristine"
    assert (pristine / "unsloth" / "unsloth" / "models" / "llama.py").is_file()
    assert "m3po" not in (pristine / "unsloth" / "unsloth" / "models" / "llama.py").read_text()
    assert not (pristine / "transformers" / "src" / "transformers" / "m3po").exists()
    assert str(pristine / "trl") in engines.environment("unpatched")["PYTHONPATH"]


def test_without_a_gpu_the_comparison_is_refused_in_one_line(
    engines: Any, tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "machine_obstacle", lambda: "this machine has no GPU that Unsloth supports")
    assert engines.main(["--model_name_or_path", str(tiny_model), *SMALL]) == 2
    printed = capsys.readouterr().err
    assert "this machine has no GPU" in printed and len(printed.splitlines()) == 1


def test_trls_steps_are_measured_by_mode_gone_on_with_after_a_stop_and_reported(
    engines: Any, tiny_model: Path, tmp_path: Path
) -> None:
    settings = {"modes": ["none", "h3po"], "prompts": 2, "paths": 2, "length": 3, "rounds": 1, "warmup": 1, "steps": 2}
    settings |= {"dtype": "float32", "model": str(tiny_model)}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    result = tmp_path / "trl.json"
    words = ["trl", str(tmp_path / "settings.json"), str(result)]
    engine_steps = importlib.import_module("engine_steps")
    assert engine_steps.main(words) == 0
    found = json.loads(result.read_text())
    assert [run["mode"] for run in found["runs"]] == ["none", "h3po"] and engines.missing_runs(
        "trl", settings, result
    ) == 0
    for run in found["runs"]:
        assert len(run["seconds"]) == len(run["rollout_seconds"]) == len(run["tokens"]) == 2
        assert all(0 < inner < outer for inner, outer in zip(run["rollout_seconds"], run["seconds"], strict=True))
        assert max(run["rollout_logp_diff_max"]) < 1e-4
    kept = found["runs"][0]
    result.write_text(json.dumps({**found, "runs": [kept]}))
    assert engines.missing_runs("trl", settings, result) == 1
    assert engine_steps.main(words) == 0
    again = json.loads(result.read_text())["runs"]
    assert again[0] == kept and again[1]["mode"] == "h3po" and again[1]["seconds"] != found["runs"][1]["seconds"]

    runs = [{**run, "peak_bytes": 1 << 20} for run in again]
    results = {name: {"runs": runs, "scores": {}} for name in ("unsloth", "trl")}
    twice = [{**runs[0], "tokens": [2 * count for count in runs[0]["tokens"]]}]
    lines = engines.report(results | {"unpatched": {"runs": twice, "scores": {}}}, settings)
    assert len(lines) == 7  # head, rule, unpatched, two modes of each engine
    assert [line.split("|")[5].strip() for line in lines[2:4]] == ["1.00", "0.50"]
    assert [line.split("|")[6].strip() for line in lines[2:4]] == ["2.00", "1.00"]
