# SPDX-License-Identifier: Apache-2.0
"""`--engine`: what is chosen and why, what is refused, and the folder of the trainer that Unsloth generates.

Unsloth itself runs in tests/unsloth. Where a test needs a machine with a GPU, that one answer is replaced (`on_a_gpu`).
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOConfig, ModelConfig

from m3po_lab.core.errors import UserError
from m3po_lab.grpo import engine
from m3po_lab.grpo.arguments import RunArguments
from m3po_lab.grpo.config import parse_run
from m3po_lab.grpo.resume import check_same_run
from m3po_lab.models.unsloth_model import HOOKED, check_hooked
from m3po_lab.train import main

LORA = ["--use_peft", "true", "--dtype", "bfloat16", "--bf16", "true"]


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "machine_obstacle", lambda: None)


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text("dtype: bfloat16\nbf16: true\nuse_peft: true\n")
    return file


def test_without_a_gpu_auto_takes_trl_and_unsloth_is_one_line(
    yaml: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(engine, "find_spec", lambda name: True)
    assert engine.choose_engine([str(yaml)]) == engine.Engine(
        "trl", "auto: this machine has no GPU that Unsloth supports"
    )
    assert main([str(yaml), "--engine", "unsloth"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: --engine unsloth: this machine has no GPU") and len(printed.splitlines()) == 1


def test_without_a_gpu_the_extra_that_would_not_help_is_not_named(yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(engine, "find_spec", lambda name: None)
    assert engine.choose_engine([str(yaml)]).why == "auto: this machine has no GPU that Unsloth supports"


@pytest.mark.parametrize("text", ["just text", "- a list", "[1", "3"])
def test_a_yaml_that_is_no_mapping_is_one_line(text: str, yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    yaml.write_text(text)
    assert main([str(yaml)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: run.yaml or a flag: ") and printed.count("\n") == 1


def test_a_file_that_is_no_text_is_one_line(yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    yaml.write_bytes(bytes(range(128, 256)))
    assert main([str(yaml)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {yaml}, line 1: not UTF-8 (byte 0x80)")


def test_without_the_extra_unsloth_is_one_line_that_names_it(yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(engine, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="the environment lacks Unsloth: make env EXTRA=unsloth"):
        engine.choose_engine([str(yaml), "--engine", "unsloth"])
    assert engine.choose_engine([str(yaml)]).name == "trl"


def test_several_processes_and_old_gpus_are_trls(yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))
    assert "compute capability 6.1 and Unsloth needs 7.0" in engine.choose_engine([str(yaml)]).why
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert engine.choose_engine([str(yaml)]).name == "unsloth"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="several processes is TRL's: unset ACCELERATE_CONFIG"):
        engine.choose_engine([str(yaml), "--engine", "unsloth"])


@pytest.mark.parametrize(
    "words",
    [LORA, ["--use_peft", *LORA[2:]], ["--use_peft=true", "--dtype=bfloat16"], [*LORA, "--load_in_4bit", "true"]],
)
@pytest.mark.usefixtures("on_a_gpu")
def test_on_a_gpu_auto_takes_unsloth_for_lora(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("mode: m3po\n")
    assert engine.choose_engine([str(tmp_path / "run.yaml"), *words]).name == "unsloth"
    assert engine.choose_engine([str(tmp_path / "run.yaml"), *words, "--engine", "trl"]) == engine.TRL


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--use_cpu", "true"], "--use_cpu true"),
        (["--dtype", "float32"], "--dtype is float32: set --dtype bfloat16"),
        (["--bf16", "false"], "half precision"),
        (["--dtype", "float16"], "half precision"),
        (["--use_dora", "true"], "--use_dora true"),
        (["--use_vllm", "true"], "--use_vllm true"),
        (["--load_in_8bit", "true"], "--load_in_8bit true"),
        (["--attn_implementation", "eager"], "--attn_implementation"),
        (["--lora_target_parameters", "x"], "--lora_target_parameters"),
        (["--lora_target_modules", "q_proj", "embed_tokens"], "--lora_target_modules embed_tokens: .* whole"),
        (["--lora_modules_to_save", "lm_head", "embed_tokens"], "--lora_modules_to_save .* tie the two"),
        (["--use_peft", "false", "--load_in_4bit", "true"], "--load_in_4bit true is for LoRA"),
        (["--use_peft", "false", "--beta", "0.1"], "--beta above 0"),
        (["--gating_training", "logits"], "--gating_training logits"),
        (["--model_name_or_path", "ADAPTER"], "is a LoRA adapter"),
        (["--model_name_or_path", "STREAMS"], "has hyper-connections, which its fast paths leave out"),
    ],
)
@pytest.mark.usefixtures("on_a_gpu")
def test_what_unsloth_would_do_otherwise_is_trls_or_refused(
    words: list[str], why: str, yaml: Path, tmp_path: Path
) -> None:
    for place, file, text in (("ADAPTER", "adapter_config", "{}"), ("STREAMS", "config", '{"mhc_enabled": true}')):
        (tmp_path / place).mkdir()
        (tmp_path / place / f"{file}.json").write_text(text)
    words = [str(yaml), *(str(tmp_path / word) if word.isupper() else word for word in words)]
    chosen = engine.choose_engine(words)
    assert chosen.name == "trl" and re.search(why, chosen.why)
    with pytest.raises(UserError, match=r"^--engine unsloth: .*" + why):
        engine.choose_engine([*words, "--engine", "unsloth"])


@pytest.mark.usefixtures("on_a_gpu")
def test_without_lora_auto_takes_trl_and_unsloth_can_be_asked_for(yaml: Path) -> None:
    words = [str(yaml), "--use_peft", "false"]
    assert engine.choose_engine(words).why == "auto: without LoRA Unsloth runs the same forwards"
    assert engine.choose_engine([*words, "--engine", "unsloth"]).name == "unsloth"


def test_an_unknown_engine_is_one_line(yaml: Path) -> None:
    with pytest.raises(UserError, match="--engine vllm is unknown; give one of auto, unsloth, trl"):
        engine.choose_engine([str(yaml), "--engine", "vllm"])


def test_the_choice_looks_at_trls_flags_with_trls_defaults() -> None:
    defaults: dict[str, Any] = {}
    for group in (ModelConfig, GRPOConfig, RunArguments):
        defaults |= {entry.name: entry.default for entry in dataclasses.fields(group)}
    assert {name: defaults[name] for name in engine.LOOKED_AT} == engine.LOOKED_AT


def test_the_parsed_flags_are_checked_again(yaml: Path) -> None:
    run = dataclasses.replace(parse_run([str(yaml)]), engine=engine.Engine("unsloth", "as asked"))
    with pytest.raises(
        UserError, match="--engine unsloth: --use_cpu true needs trl: leave it out; or set --engine trl"
    ):
        engine.check_flags(run.engine, run.groups)
    run.training.use_cpu = False
    engine.check_flags(run.engine, run.groups)
    run.model.dtype = "float32"
    with pytest.raises(UserError, match="--engine unsloth: it trains in half precision"):
        engine.check_flags(run.engine, run.groups)


def test_a_checkpoint_of_another_engine_is_refused(finished_run: Path, tiny_config: Path) -> None:
    checkpoint = finished_run / "checkpoint-2"
    run = parse_run([str(tiny_config), "--output_dir", str(finished_run)])
    check_same_run(checkpoint, run, {})
    with pytest.raises(
        UserError, match="checkpoint-2 was written by a run with --engine trl, and this one has unsloth"
    ):
        check_same_run(checkpoint, dataclasses.replace(run, engine=engine.Engine("unsloth", "as asked")), {})


def test_the_generated_trainer_has_a_folder_for_each_state_of_the_patches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "PROJECT_ROOT", tmp_path)
    places = []
    for name in ("overlay.toml", "patches/unsloth/a.patch", "overlay/trl/new.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
        places.append(engine.trainer_cache())
        assert engine.trainer_cache() == places[-1]
    (tmp_path / "patches/unsloth/a.patch").write_text("2")
    places.append(engine.trainer_cache())
    assert len(set(places)) == 4 and all(place.parent == tmp_path / ".cache" / "unsloth" for place in places)
    monkeypatch.setattr(engine.os, "access", lambda *given: False)  # as the system answers where one may not write
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    assert engine.trainer_cache() == tmp_path / "mine/m3po-overlay/unsloth" / places[-1].name


@pytest.mark.parametrize("model_type", ["smollm3", "mistral"])
def test_a_model_without_hooks_in_unsloth_is_refused_by_its_type(model_type: str) -> None:
    with pytest.raises(UserError, match=f"its forward of {model_type} has no hooks .* give --engine trl"):
        check_hooked(model_type)
    for known in HOOKED:
        check_hooked(known)
