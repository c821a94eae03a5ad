# SPDX-License-Identifier: Apache-2.0
"""Runs with ASLR from start to evaluation: adapter and full model, in every mode, with the loop on and off.

The learning rate is so large that the modules leave their identity start at once and what they do is seen.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.m3po.aslr.modules import ASLR_PARAMETERS
from trl import ModelConfig

from m3po_lab import eval_gsm8k, export_model
from m3po_lab.core.errors import UserError
from m3po_lab.core.files import read_json, write_json
from m3po_lab.models.loading import load_model
from m3po_lab.train import main

KINDS = {"full": (), "adapter": ("--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "q_proj", "down_proj")}
ASLR = ("--aslr_enabled", "true", "--aslr_num_paths", "3", "--aslr_threshold", "0.25")
# Each kind and each mode with ASLR; that runs without it resume and are evaluated is in the files beside this one.
MATRIX = [("full", "none", True), ("full", "m3po", True), ("adapter", "m3po", True), ("adapter", "h3po", True)]
MATRIX += [("full", "none", False)]
WITH_ASLR = [("full", "m3po"), ("adapter", "h3po")]
SHORT = ("--dataset", "problems", "--batch_size", "6")
Runs = Callable[[str, str, bool], Path]


def words(kind: str, mode: str, aslr: bool) -> list[str]:
    return ["--mode", mode, "--max_steps", "4", "--learning_rate", "0.05", *KINDS[kind], *(ASLR if aslr else ())]


@pytest.fixture(scope="module")
def run_of(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Finished runs of 4 steps, checkpoints at 2 and 4, each made once."""
    made: dict[tuple[str, str, bool], Path] = {}

    def make(kind: str, mode: str, aslr: bool) -> Path:
        if (kind, mode, aslr) not in made:
            folder = tmp_path_factory.mktemp("runs") / f"{kind}-{mode}-{aslr}"
            assert main([str(tiny_config), *words(kind, mode, aslr), "--output_dir", str(folder)]) == 0
            made[kind, mode, aslr] = folder
        return made[kind, mode, aslr]

    return make


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def logits_of(folder: Path, **inputs: object) -> torch.Tensor:
    model, _ = load_model(ModelConfig(model_name_or_path=str(folder), dtype="float32"))
    with torch.no_grad():
        return model.eval()(torch.arange(2, 22).reshape(2, 10), **inputs).logits


def evaluated(folder: Path, out: Path, *more: str) -> list[list[str]]:
    assert eval_gsm8k.main([str(folder), *SHORT, *more, "--output_dir", str(out)]) == 0
    return [json.loads(line)["completions"] for line in (out / "problems.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("kind", "mode", "aslr"), MATRIX)
def test_resumed_run_ends_where_the_uninterrupted_one_does(
    kind: str, mode: str, aslr: bool, run_of: Runs, tiny_config: Path, tmp_path: Path
) -> None:
    whole = run_of(kind, mode, aslr)
    folder = tmp_path / "resumed"
    shutil.copytree(whole / "checkpoint-2", folder / "checkpoint-2")
    resume = ["--output_dir", str(folder), "--resume_from_checkpoint", "true"]
    assert main([str(tiny_config), *words(kind, mode, aslr), *resume]) == 0
    uninterrupted, resumed = weights_of(whole / "final"), weights_of(folder / "final")
    assert uninterrupted.keys() == resumed.keys()
    assert [name for name in resumed if not torch.equal(resumed[name], uninterrupted[name])] == []
    brought = [name for name in resumed if "m3po_" in name]
    assert len(brought) == (len(ASLR_PARAMETERS) if aslr else 0)
    half_way = weights_of(whole / "checkpoint-2")
    assert not brought or any(not torch.equal(resumed[name], half_way[name]) for name in brought)


@pytest.mark.parametrize(("kind", "mode", "aslr"), MATRIX)
def test_checkpoint_says_its_aslr_and_is_evaluated_with_the_loop_off_and_on(
    kind: str, mode: str, aslr: bool, run_of: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    final = run_of(kind, mode, aslr) / "final"
    numbers = read_json(final / "m3po.json") or {}
    told = {name: value for name, value in numbers.items() if name.startswith("aslr_")}
    expected = {
        "aslr_enabled": True,
        "aslr_num_paths": 3,
        "aslr_max_iterations": 2,
        "aslr_threshold": 0.25,
        "aslr_gumbel_temp": 1.0,
        "aslr_cross_path_lambda": 0.1,
        "aslr_cross_path_temp": 0.1,
    }
    assert told == (expected if aslr else {})
    capsys.readouterr()
    evaluated(final, tmp_path / "off")
    said = capsys.readouterr().out
    assert ("ASLR off (is_m3po_inference=True): aslr_num_paths=3" in said) == aslr
    assert "the same text for 6 of 6 problems" in said  # the report's evaluation leaves the loop out as well
    if not aslr:
        assert eval_gsm8k.main([str(final), *SHORT, "--aslr", "on", "--output_dir", str(tmp_path / "on")]) == 2
        assert "has no ASLR; leave the flag out" in capsys.readouterr().err
        return
    on = evaluated(final, tmp_path / "on", "--aslr", "on")
    said = capsys.readouterr().out
    assert "ASLR on (is_m3po_inference=False): aslr_num_paths=3" in said and "the same text" not in said
    loop = logits_of(final, aslr_row_seeds=torch.tensor([3, 4]), is_m3po_inference=False)
    assert (loop - logits_of(final, is_m3po_inference=True)).abs().max() > 0.01, "the loop does nothing"
    # Completions may be the same with and without the loop: the large learning rate leaves few.
    routers = [(read_json(tmp_path / name / "results.json") or {}).get("router") for name in ("off", "on")]
    assert routers[0] is None and routers[1] is not None and routers[1]["tokens"] > 0
    assert on == evaluated(final, tmp_path / "again", "--aslr", "on", "--batch_size", "2")
    assert (read_json(tmp_path / "on" / "results.json") or {})["aslr"] == "on"


def test_full_reduced_and_skipped_loops_are_compared_problem_by_problem(
    run_of: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    final = run_of("full", "none", True) / "final"
    words = [str(final), *SHORT, "--output_dir", str(tmp_path / "both")]
    assert eval_gsm8k.main([*words, "--aslr", "both", "--aslr_max_iterations", "1"]) == 0
    said = capsys.readouterr().out
    assert "ASLR R=1 (is_m3po_inference=False): aslr_num_paths=3, aslr_max_iterations=1" in said
    found = read_json(tmp_path / "both" / "results.json") or {}
    assert list(found["evaluations"]) == ["off", "R=1", "on"]
    assert [(row["from"], row["to"]) for row in found["paired"]] == [("off", "R=1"), ("off", "on"), ("R=1", "on")]
    for row in found["paired"]:
        assert row["n"] == 6
        assert f"| problems | {row['from']} → {row['to']} | 6 |" in said
    router = {name: kept.get("router") for name, kept in found["evaluations"].items()}
    assert router["off"] is None
    for name in ("R=1", "on"):
        assert router[name]["tokens"] > 0 and 0 <= router[name]["activation_rate_actual"] <= 1
        assert 0 < router[name]["router_weight_mean"] < 1
        assert f"ASLR {name}: the router activates" in said
    assert router["R=1"]["latent_diversity_after"] > router["on"]["latent_diversity_after"], (
        "a round brings them closer"
    )
    assert evaluated(final, tmp_path / "on", "--aslr", "on") == [
        json.loads(line)["completions"] for line in (tmp_path / "both" / "problems-on.jsonl").read_text().splitlines()
    ]
    reduced = evaluated(final, tmp_path / "reduced", "--aslr", "on", "--aslr_max_iterations", "1")
    lines = (tmp_path / "both" / "problems-R=1.jsonl").read_text().splitlines()
    assert reduced == [json.loads(line)["completions"] for line in lines]
    alone = (read_json(tmp_path / "reduced" / "results.json") or {})["router"]
    assert alone == router["R=1"]


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--aslr", "both", "--num_paths", "3"], "--num_paths 3: --aslr both compares one greedy path"),
        (["--aslr", "on", "--aslr_max_iterations", "-1"], "--aslr_max_iterations=-1 is no whole number from 0 on"),
        (["--aslr_max_iterations", "1"], "with aslr_max_iterations 2"),
    ],
)
def test_wrong_rounds_are_one_line(more: list[str], why: str, run_of: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert eval_gsm8k.main([str(run_of("full", "none", True) / "final"), *SHORT, *more]) == 2
    error = capsys.readouterr().err
    assert why in error and error.count("\n") == 1


def test_folder_with_the_prototypes_modules_is_no_plain_model(
    run_of: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(run_of("full", "none", False) / "final", folder)
    torch.save({}, folder / "m3po_modules.bin")
    assert eval_gsm8k.main([str(folder), *SHORT]) == 2
    assert "has m3po_modules.bin, the prototype's modules of ASLR" in capsys.readouterr().err
    with pytest.raises(UserError, match="has m3po_modules.bin"):
        load_model(ModelConfig(model_name_or_path=str(folder)))


@pytest.mark.parametrize(("kind", "mode"), WITH_ASLR)
def test_paths_of_a_problem_have_noise_of_their_own(kind: str, mode: str, run_of: Runs, tmp_path: Path) -> None:
    final = run_of(kind, mode, True) / "final"
    sampled = [
        evaluated(final, tmp_path / name, "--num_paths", "3", "--aslr", "on", *more)
        for name, more in (("first", ()), ("same", ()), ("other", ("--seed", "1")))
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    assert any(len(set(paths)) > 1 for paths in sampled[0])


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--aslr_num_paths", "4", "says mode m3po with aslr_num_paths 3"),
        ("--aslr_max_iterations", "1", "with aslr_max_iterations 2"),
        ("--aslr_threshold", "0.5", "with aslr_threshold 0.25"),
        ("--aslr_enabled", "false", "with aslr_enabled True"),
    ],
)
def test_evaluation_with_another_number_is_refused(
    flag: str, value: str, said: str, run_of: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    final = run_of("adapter", "m3po", True) / "final"
    assert eval_gsm8k.main([str(final), *SHORT, flag, value, "--output_dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error and value in error.lower() and error.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "name", "value", "said"),
    [
        ("config.json", "aslr_threshold", 0.75, "trained with 0.25, and the configuration of the model says 0.75"),
        ("m3po.json", "aslr_max_iterations", 7, "trained with 7, and the configuration of the model says 2"),
        ("m3po.json", "aslr_enabled", False, "trained with False, and the configuration of the model says True"),
        ("config.json", "aslr_num_paths", 4, "m3po_path_aggregator.weight"),
    ],
)
def test_full_model_whose_files_contradict_each_other_is_refused(
    file: str, name: str, value: object, said: str, run_of: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(run_of("full", "m3po", True) / "final", tmp_path / "final"))
    write_json(folder / file, (read_json(folder / file) or {}) | {name: value})
    assert eval_gsm8k.main([str(folder), *SHORT, "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", ["missing", "misshaped", "unexpected"])
def test_checkpoint_with_a_damaged_module_is_an_error(kind: str, damage: str, run_of: Runs, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run_of(kind, "m3po", True) / "final", tmp_path / "final"))
    file, weights = next(folder.glob("*.safetensors")), weights_of(folder)
    (name,) = [key for key in weights if key.endswith("m3po_router.gate.weight")]
    if damage == "missing":
        del weights[name]
    elif damage == "misshaped":
        weights[name] = weights[name][:, :-1].contiguous()
    elif kind == "full":
        config = read_json(folder / "config.json") or {}
        write_json(folder / "config.json", {key: config[key] for key in config if not key.startswith("aslr_")})
    else:
        adapter = read_json(folder / "adapter_config.json") or {}
        write_json(folder / "adapter_config.json", adapter | {"modules_to_save": None})
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="m3po_"):
        load_model(ModelConfig(model_name_or_path=str(folder), dtype="float32"))


def test_adapter_whose_numbers_are_not_told_is_an_error(run_of: Runs, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run_of("adapter", "m3po", True) / "final", tmp_path / "final"))
    (folder / "m3po.json").unlink()
    with pytest.raises(UserError, match="its adapter brings ASLR, and its m3po.json does not say aslr_enabled"):
        load_model(ModelConfig(model_name_or_path=str(folder), dtype="float32"))


@pytest.mark.parametrize("more", [[], ["--aslr_enabled", "true", "--aslr_num_paths", "4"]])
def test_resuming_with_other_aslr_is_refused(
    more: list[str], run_of: Runs, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_of("full", "m3po", True) / "checkpoint-2", folder / "checkpoint-2")
    given = [*words("full", "m3po", False), *more, "--output_dir", str(folder), "--resume_from_checkpoint", "true"]
    assert main([str(tiny_config), *given]) == 2
    error = capsys.readouterr().err
    assert "checkpoint-2 was trained with" in error and "aslr_" in error and error.count("\n") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_that_lacks_a_module_is_not_resumed(
    kind: str, run_of: Runs, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(run_of(kind, "m3po", True) / "checkpoint-2", tmp_path / "run" / "checkpoint-2"))
    file, weights = next(folder.glob("*.safetensors")), weights_of(folder)
    save_file({name: value for name, value in weights.items() if "m3po_router" not in name}, file, {"format": "pt"})
    given = [*words(kind, "m3po", True), "--output_dir", str(folder.parent), "--resume_from_checkpoint", str(folder)]
    assert main([str(tiny_config), *given]) == 2
    assert "cannot be resumed: m3po_router.gate.weight is missing" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "mode"), WITH_ASLR)
def test_exported_model_keeps_its_aslr_or_leaves_it_out(
    kind: str, mode: str, run_of: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    final = run_of(kind, mode, True) / "final"
    seeds = {"aslr_row_seeds": torch.tensor([3, 4]), "is_m3po_inference": False}
    for name, more in (("whole", []), ("without", ["--aslr", "off"])):
        assert export_model.main([str(final), str(tmp_path / name), *more]) == 0
    said = capsys.readouterr().out
    assert "a checkpoint with ASLR" in said
    assert ("stock vLLM can serve it" in said) == (mode == "m3po")
    loop = logits_of(final, **seeds)
    torch.testing.assert_close(logits_of(tmp_path / "whole", **seeds), loop, atol=1e-4, rtol=0)
    plain = logits_of(tmp_path / "without")
    torch.testing.assert_close(plain, logits_of(final, is_m3po_inference=True), atol=1e-4, rtol=0)
    assert (loop - plain).abs().max() > 0.01, "the loop does nothing"
    assert not [name for name in weights_of(tmp_path / "without") if "m3po_" in name]
    for name in ("config.json", "m3po.json"):
        assert not [key for key in read_json(tmp_path / "without" / name) or {} if key.startswith("aslr_")]
    assert not [line for line in evaluated(tmp_path / "without", tmp_path / "out") if not line]
