# SPDX-License-Identifier: Apache-2.0
"""`eval_gsm8k.sh --engine vllm`: the texts of the other engine, greedy and as paths."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer
from transformers.m3po import write_checkpoint_info
from transformers.m3po.settings import ThinkingSettings
from vllm_engine import LENGTH, checkpoint

from m3po_lab.eval_gsm8k import main
from m3po_lab.evaluation.settings import EvalSettings

PROBLEMS = 12
SETTINGS = EvalSettings(
    dataset="reasoning-gym:chain_sum",
    dataset_config={"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    num_eval_problems=PROBLEMS,
    eval_seed=5,
    system_prompt=None,
    prompt_template="What is {expression} ?",
    worked_example=None,
    chat_template_kwargs=None,
    answer_start="####",
    max_completion_length=LENGTH,
    batch_size=8,
    precision="no",
)
CHAT = "{% for turn in messages %}{{ turn['content'] }} {% endfor %}"


def save(folder: Path, mode: str, lora: bool = False) -> Path:
    """A tiny checkpoint, or an adapter on it; the folder to evaluate."""
    model = checkpoint(folder, "llama", mode)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    if lora:
        adapter = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        adapter.peft_config["default"].base_model_name_or_path = str(folder)
        folder = folder / "adapter"
        adapter.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    settings = None if mode == "none" else ThinkingSettings(mode=mode, cross_path_lambda=0.3)
    numbers = {"mode": mode, "answer_start": "####"} if settings is None else settings.hyperparameters()
    write_checkpoint_info(folder, {**numbers, "sampling_temperature": 0.7})
    SETTINGS.write(folder)
    return folder


def texts(folder: Path, out: Path, *flags: str, alone: bool = False) -> list[list[str]]:
    """The completions of each problem; of a process of its own, in which nothing has imported vLLM, if `alone`."""
    words = [str(folder), "--dataset", "problems", "--output_dir", str(out), *flags]
    if alone:
        subprocess.run([sys.executable, "-m", "m3po_lab.eval_gsm8k", *words], check=True, timeout=200)
    else:
        assert main(words) == 0
    return [json.loads(line)["completions"] for line in (out / "problems.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("mode", "lora"), [("none", False), ("hrpo", False), ("m3po", True)])
def test_greedy_texts_are_those_of_the_other_engine(tmp_path: Path, mode: str, lora: bool) -> None:
    folder = save(tmp_path / "model", mode, lora)
    mine = texts(folder, tmp_path / "a")
    theirs = texts(folder, tmp_path / "b", "--engine", "vllm", alone=mode == "none")
    same = sum(one == other for one, other in zip(mine, theirs, strict=True))
    assert len(mine) == PROBLEMS and same >= PROBLEMS - 1, "rounding may turn one token"
    assert len({str(one) for one in mine}) > 1


def test_paths_are_groups(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "m3po")
    flags = ("--engine", "vllm", "--num_paths", "4", "--seed", "3")
    first = texts(folder, tmp_path / "a", *flags)
    assert first == texts(folder, tmp_path / "b", *flags), "equal seeds, equal texts"
    assert all(len(one) == 4 and len(set(one)) > 1 for one in first)
