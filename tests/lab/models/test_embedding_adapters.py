# SPDX-License-Identifier: Apache-2.0
"""Adapters that train the embeddings or the head: what is saved, loaded, resumed and exported is what was trained."""

import os
from pathlib import Path

import pytest
import torch
from lab.core.test_observing import state_of
from lab.models.embedding_adapters import logits, with_tying
from safetensors.torch import load_file
from trl import GRPOTrainer, ModelConfig

from m3po_lab.export_model import main as export
from m3po_lab.grpo.config import parse_run
from m3po_lab.grpo.engine import choose_engine
from m3po_lab.grpo.session import TrainingClock, build_trainer
from m3po_lab.models.loading import load_model
from m3po_lab.problems.data import load_problems, training_rows
from m3po_lab.train import main

# Flags of a run. The learning rate is that of a run that moves every weight far within a few steps.
LORA = ("--use_peft", "true", "--lora_r", "4", "--lora_dropout", "0", "--learning_rate", "0.03", "--mode", "m3po")
FLAGS = {
    "LoRA on embed_tokens": ("--lora_target_modules", "q_proj", "embed_tokens"),
    "LoRA on all-linear": ("--lora_target_modules", "all-linear"),
    "embed_tokens whole": ("--lora_target_modules", "q_proj", "--lora_modules_to_save", "embed_tokens"),
    "lm_head whole": ("--lora_target_modules", "q_proj", "--lora_modules_to_save", "lm_head"),
    "both whole": ("--lora_target_modules", "q_proj", "--lora_modules_to_save", "lm_head", "embed_tokens"),
}


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def start(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> Path:
    return with_tying(tiny_model, tmp_path / "start", request.param)


def trained(words: list[str]) -> GRPOTrainer:
    """The trainer of a run after its training, without its evaluations."""
    run = parse_run(words, choose_engine(words))
    problems, _ = load_problems(run.script)
    rows = training_rows(problems, run.script, 4)
    run.training.shuffle_dataset = False
    trainer = build_trainer(run, rows, TrainingClock())
    trainer.train()
    return trainer


@pytest.mark.parametrize("way", FLAGS)
def test_what_is_saved_and_exported_computes_what_the_model_in_memory_does(
    way: str, start: Path, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tiny_config), "--model_name_or_path", str(start), *LORA, *FLAGS[way], "--max_steps", "2"]
    trainer = trained([*words, "--output_dir", str(tmp_path / "run")])
    untrained, _ = load_model(ModelConfig(model_name_or_path=str(start), dtype="float32"))
    wanted, before = logits(trainer.model), state_of(trainer.model)
    assert (wanted - logits(untrained)).abs().max() > 0.01, "the run learnt nothing"
    trainer.save_model(str(tmp_path / "final"))
    assert state_of(trainer.model) == before
    for folder in ("final", "run/checkpoint-2"):
        again, _ = load_model(ModelConfig(model_name_or_path=str(tmp_path / folder), dtype="float32"))
        assert torch.equal(logits(again), wanted)
        assert {name for name, value in again.named_parameters() if value.requires_grad} == set(before["trained"])
    assert export([str(tmp_path / "final"), str(tmp_path / "out")]) == 0
    written, _ = load_model(ModelConfig(model_name_or_path=str(tmp_path / "out"), dtype="float32"))
    torch.testing.assert_close(logits(written), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("way", ["embed_tokens whole", "both whole"])
def test_such_a_run_stopped_and_resumed_is_the_uninterrupted_run(
    way: str, tiny_model: Path, tiny_config: Path, tmp_path: Path
) -> None:
    """The uninterrupted one is evaluated before its training and the resumed one is not."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    start = with_tying(tiny_model, tmp_path / "start", tied=True)
    words = [str(tiny_config), "--model_name_or_path", str(start), *LORA, *FLAGS[way], "--max_steps", "4"]
    assert main([*words, "--output_dir", str(tmp_path / "whole")]) == 0
    assert main([*words[:-1], "2", "--output_dir", str(tmp_path / "parts")]) == 0
    assert main([*words, "--output_dir", str(tmp_path / "parts"), "--resume_from_checkpoint", "true"]) == 0
    one, other = (load_file(tmp_path / run / "final" / "adapter_model.safetensors") for run in ("whole", "parts"))
    assert one.keys() == other.keys() and any("embed_tokens" in name for name in one)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_lora_on_the_head_is_refused_at_the_start(
    tiny_model: Path, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TRL scores by the head's matrix alone, so the adapter would never learn."""
    words = [str(tiny_config), "--model_name_or_path", str(tiny_model), *LORA, "--output_dir", str(tmp_path / "run")]
    for way in (
        ("--lora_target_modules", "q_proj", "lm_head"),
        ("--lora_target_modules", "lm_head"),
        ("--lora_target_parameters", "lm_head.weight"),
    ):
        assert main([*words, *way]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert f"{way[0]} {way[-1]}" in line and "--lora_modules_to_save lm_head" in line
