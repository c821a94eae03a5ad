# SPDX-License-Identifier: Apache-2.0
"""The numbers under `m3po/` and the file `m3po.json` that a run leaves."""

from __future__ import annotations

import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers.m3po import read_checkpoint_info

COMMON = {"rollout_logp_diff", "rollout_logp_diff_max", "distinct_answers"}
BLENDED = {
    "thinking_fraction",
    "thinking_length",
    "attention_entropy",
    "attention_max",
    "attention_variance",
    "active_paths",
    "similarity_mean",
    "similarity_min",
    "similarity_max",
}


def names(entry: dict[str, Any]) -> set[str]:
    return {key.removeprefix("m3po/") for key in entry if key.startswith("m3po/")}


def test_a_run_with_cross_path_logs_every_number_within_its_range(tiny: Any, tmp_path: Path):
    run = tiny.trainer(tmp_path, flags={"mode": "m3po", "answer_start": "#", "max_steps": 3})
    run.train()
    entries = run.state.log_history[:3]
    for entry in entries:
        assert names(entry) == COMMON | BLENDED
        value = {name: entry[f"m3po/{name}"] for name in COMMON | BLENDED}
        assert 0 <= value["rollout_logp_diff"] <= value["rollout_logp_diff_max"] < 1e-4
        assert 0 <= value["distinct_answers"] <= 4
        assert 0 < value["thinking_fraction"] < 1 < value["thinking_length"] < 12
        assert 0 < value["attention_entropy"] <= math.log(3)
        assert 1 / 3 <= value["attention_max"] <= 1
        assert 0 <= value["attention_variance"] <= 0.25
        assert 1 <= value["active_paths"] <= 4
        assert 0 <= value["similarity_min"] <= value["similarity_mean"] <= value["similarity_max"] <= 1
    assert len({entry["m3po/attention_entropy"] for entry in entries}) == 3


def test_the_control_logs_the_difference_and_the_answers_and_nothing_about_paths(tiny: Any, tmp_path: Path):
    run = tiny.trainer(tmp_path, flags={"mode": "none", "answer_start": "#"})
    run.train()
    assert [names(entry) for entry in run.state.log_history[:2]] == [COMMON, COMMON]
    assert max(tiny.logged(run, "m3po/rollout_logp_diff_max")) < 1e-4


def test_the_largest_difference_between_two_log_lines_is_the_one_logged(tiny: Any, tmp_path: Path):
    flags = {"mode": "m3po", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 1}
    run = tiny.trainer(tmp_path, flags=flags)
    loss, largest = run._compute_loss, []

    def off_by(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        shift = 0.5 if len(largest) == 1 else 0.0  # the second of four micro-batches
        inputs["rollout_per_token_logps"] = inputs["rollout_per_token_logps"] + shift
        largest.append(shift)
        return loss(model, inputs)

    run._compute_loss = off_by
    run.train()
    (worst,), (mean,) = (tiny.logged(run, f"m3po/rollout_logp_diff{end}") for end in ("_max", ""))
    assert worst == pytest.approx(0.5, abs=1e-4) and mean == pytest.approx(0.5 / 4, abs=1e-4)


def test_thinking_fraction_is_the_share_of_tokens_before_the_marker_is_complete(tiny: Any, tmp_path: Path):
    seen: list[list[list[int]]] = []

    def reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.append(completion_ids)
        return tiny.reward(completions)

    flags = {"mode": "m3po", "answer_start": "##", "max_steps": 3}
    run = tiny.trainer(tmp_path, flags=flags, reward_funcs=reward)
    run.train()
    decode = tiny.tokenizer().decode
    expected = []
    for completions in seen:
        prefixes = [ids[: t + 1] for ids in completions for t in range(len(ids))]
        thinking = [("##" not in decode(prefix)) for prefix in prefixes]
        expected.append(sum(thinking) / len(thinking))
    assert tiny.logged(run, "m3po/thinking_fraction") == pytest.approx(expected)
    assert min(expected) < 1


def test_distinct_answers_counts_the_texts_behind_the_first_marker_group_by_group(tiny: Any, tmp_path: Path):
    texts = [
        ["1#### 12 ", "3####12", "5####7", "9+9"],  # 12 twice, 7: two answers
        ["1+1", "##2", "###3", ""],  # no marker: none
        ["1####2####3", "####2", "####", "4####3"],  # `2####3`, `2`, the empty text and `3`: four
    ]
    tokenizer = tiny.tokenizer()
    rows = [torch.tensor([*tokenizer(text)["input_ids"], 1]).long() for group in texts for text in group]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=3)  # what is masked is never read
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    run = tiny.trainer(tmp_path, flags={"mode": "none"})
    assert run.m3po._distinct_answers(ids, mask).item() == pytest.approx((2 + 0 + 4) / 3)


NUMBERS = {
    "mode": "m3po",
    "cross_path_lambda": 0.2,
    "cross_path_phase": "all",
    "cross_path_top_k": 2,
    "answer_start": "##",
    "gating_config": {"temperature": 0.3},
}


@pytest.mark.parametrize("adapter", [None, LoraConfig(r=2, target_modules="all-linear")], ids=["full", "lora"])
def test_every_checkpoint_and_every_saved_model_carries_its_mode_and_numbers(
    tiny: Any, tmp_path: Path, adapter: LoraConfig | None
):
    flags = {**NUMBERS, "save_strategy": "steps", "save_steps": 1, "temperature": 0.8}
    run = tiny.trainer(tmp_path / "run", flags=flags, peft_config=adapter)
    run.train()
    run.save_model()
    run.save_model(str(tmp_path / "export"))
    expected = NUMBERS | {
        "cross_path_temp": 0.3,
        "gating_type": "baseline",
        "debug": False,
        "num_generations": 4,
        "sampling_temperature": 0.8,
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
    }
    folders = [tmp_path / "run" / "checkpoint-1", tmp_path / "run" / "checkpoint-2", tmp_path / "run"]
    for folder in [*folders, tmp_path / "export"]:
        assert read_checkpoint_info(folder) == expected
        assert list(folder.glob("*model*.safetensors")), folder


def test_a_control_is_saved_as_one(tiny: Any, tmp_path: Path):
    run = tiny.trainer(tmp_path, flags={"mode": "none", "max_steps": 1, "cross_path_lambda": 0.3})
    run.save_model()
    info = json.loads((tmp_path / "m3po.json").read_text(encoding="utf-8"))
    assert info["mode"] == "none" and info["sampling_temperature"] == 1.0 and info["answer_start"] == "####"
    assert "cross_path_lambda" not in info
