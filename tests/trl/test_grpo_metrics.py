# SPDX-License-Identifier: Apache-2.0
"""The numbers under `m3po/` and the file `m3po.json` that a run leaves."""

from __future__ import annotations

import copy
import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers.m3po import read_checkpoint_info
from transformers.m3po.thinking.residual_gate import attach_residual_gate
from trl.trainer.m3po.metrics import distinct_answers

COMMON = {"rollout_logp_diff", "rollout_logp_diff_max", "distinct_answers"}
THOUGHT = {"thinking_fraction", "thinking_length"}
BLENDED = {
    "peer_differs",
    "attention_entropy",
    "attention_max",
    "attention_variance",
    "active_paths",
    "similarity_mean",
    "similarity_min",
    "similarity_max",
}
GATED = {"embeds_ratio", "hidden_ratio", "mix_norm"}
OF_MODE = {"m3po": BLENDED, "hrpo": GATED, "h3po": BLENDED | GATED}
EVEN = {"thinking_residual_r_min": 0.3, "thinking_residual_r_max": 0.6}


def names(entry: dict[str, Any]) -> set[str]:
    return {key.removeprefix("m3po/") for key in entry if key.startswith("m3po/")}


@pytest.mark.parametrize("mode", OF_MODE)
def test_a_run_logs_every_number_of_its_mode_within_its_range(tiny: Any, tmp_path: Path, mode: str):
    run = tiny.trainer(tmp_path, flags={"mode": mode, "answer_start": "#", "max_steps": 3})
    run.train()
    entries = run.state.log_history[:3]
    for entry in entries:
        assert names(entry) == COMMON | THOUGHT | OF_MODE[mode]
        value = {name: entry[f"m3po/{name}"] for name in names(entry)}
        assert 0 <= value["rollout_logp_diff"] <= value["rollout_logp_diff_max"] < 1e-4
        assert 0 <= value["distinct_answers"] <= 4
        assert 0 < value["thinking_fraction"] < 1 < value["thinking_length"] < 12
        if mode != "hrpo":
            assert 0 < value["attention_entropy"] <= math.log(3)
            assert 1 / 3 <= value["attention_max"] <= 1
            assert 0 <= value["attention_variance"] <= 0.25
            assert 1 <= value["active_paths"] <= 4
            assert 0 <= value["similarity_min"] <= value["similarity_mean"] <= value["similarity_max"] <= 1
        if mode != "m3po":
            assert 0.99 <= value["embeds_ratio"] < 1  # exp(-c softplus(-Lambda)) >= 0.99, to the power r < 1
            assert 0 < value["hidden_ratio"] <= math.sqrt(1 - 0.99**2)
            assert 0 < value["mix_norm"] < 50
    for name in OF_MODE[mode] - {"similarity_max", "active_paths"}:
        assert len({entry[f"m3po/{name}"] for entry in entries}) == 3, name


@pytest.mark.parametrize("mode", ["hrpo", "h3po"])
def test_the_gates_numbers_are_those_of_the_inputs_that_the_rollout_read(tiny: Any, tmp_path: Path, mode: str):
    """Worked out again in float64 from the batch, which has a bag where an input was read as a thought."""
    flags = {"mode": mode, "answer_start": "##", "max_steps": 1, **EVEN}
    run = tiny.trainer(tmp_path, flags=flags)
    base, batches, loss = copy.deepcopy(run.model.model).double(), [], run._compute_loss
    run._compute_loss = lambda model, inputs: (batches.append(inputs), loss(model, inputs))[1]
    run.train()
    (batch,) = batches
    weights, tokens = batch["rollout_bag_weights"].double(), batch["completion_ids"]
    with torch.no_grad():
        thoughts = (weights.unsqueeze(-1) * base.embed_tokens(batch["rollout_bag_ids"].long())).sum(-2)
        own = base.embed_tokens(tokens)
        decay = -8.0 * F.softplus(-base.thinking_residual_Lambda.Lambda)
        a = (decay * base.thinking_residual_gate_r(own).sigmoid()).exp()
        mixed = a * own + (1 - a**2 + 1e-8).sqrt() * base.thinking_residual_gate_i(own).sigmoid() * thoughts
    read = weights.sum(-1) > 0
    ratio = a.mean(-1)[read]
    expected = {
        "embeds_ratio": ratio.mean(),
        "hidden_ratio": (1 - ratio**2).sqrt().mean(),
        "mix_norm": mixed.norm(dim=-1)[read].mean(),
    }
    assert 0 < read.sum() < read.numel()
    for name, value in expected.items():
        # Means, in float32, of some 40 numbers that are sums over 32 dimensions: 1e-5 is a hundred roundings.
        assert tiny.logged(run, f"m3po/{name}") == pytest.approx([value.item()], rel=1e-5), name
    texts = [
        [run._tokenizer.decode(row[: t + 1]) for t in range(int(mask.sum()))]
        for row, mask in zip(tokens, batch["completion_mask"], strict=True)
    ]
    lengths = [sum("##" not in text for text in row) for row in texts]
    assert tiny.logged(run, "m3po/thinking_length") == pytest.approx([sum(lengths) / len(lengths)])


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
        inputs["rollout_logps"] = inputs["rollout_logps"] + shift
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
    flat = [text for group in texts for text in group]
    assert distinct_answers(flat, "####", [0] * 4 + [1] * 4 + [2] * 4) == (2 + 0 + 4) / 3
    tokenizer = tiny.tokenizer()
    rows = [torch.tensor([*tokenizer(text)["input_ids"], 1]).long() for text in flat]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=3)  # what is masked is never read
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    run = tiny.trainer(tmp_path, flags={"mode": "none"})
    run.m3po.generate_kwargs(run.model, {"input_ids": ids, "attention_mask": mask}, 4)
    run.m3po._log_answers(ids, mask)
    assert run._metrics["train"]["m3po/distinct_answers"] == [pytest.approx((2 + 0 + 4) / 3)]


GIVEN = {
    "cross_path_lambda": 0.2,
    "cross_path_phase": "all",
    "cross_path_top_k": 2,
    "answer_start": "##",
    "gating_config": {"temperature": 0.3},
    "thought_top_k": 5,
    **EVEN,
}
ALWAYS = {"cross_path_phase": "all", "answer_start": "##", "debug": False}
CROSSING = {
    "cross_path_lambda": 0.2,
    "cross_path_top_k": 2,
    "cross_path_temp": 0.3,
    "gating_type": "baseline",
    "gating_config": {"temperature": 0.3},
}
THINKING = {"thought_top_k": 5, **EVEN}
NUMBERS = {"m3po": ALWAYS | CROSSING, "hrpo": ALWAYS | THINKING, "h3po": ALWAYS | CROSSING | THINKING}


@pytest.mark.parametrize("mode", NUMBERS)
@pytest.mark.parametrize("adapter", [None, LoraConfig(r=2, target_modules="all-linear")], ids=["full", "lora"])
def test_every_checkpoint_and_every_saved_model_carries_its_mode_and_numbers_and_no_other(
    tiny: Any, tmp_path: Path, adapter: LoraConfig | None, mode: str
):
    flags = {**GIVEN, "mode": mode, "save_strategy": "steps", "save_steps": 1, "temperature": 0.8}
    run = tiny.trainer(tmp_path / "run", flags=flags, peft_config=adapter)
    run.train()
    run.save_model()
    run.save_model(str(tmp_path / "export"))
    expected = NUMBERS[mode] | {
        "mode": mode,
        "num_generations": 4,
        "sampling_temperature": 0.8,
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
    }
    folders = [tmp_path / "run" / "checkpoint-1", tmp_path / "run" / "checkpoint-2", tmp_path / "run"]
    for folder in [*folders, tmp_path / "export"]:
        assert read_checkpoint_info(folder) == expected
        (saved,) = folder.glob("*model*.safetensors")
        assert sum("thinking_residual" in name for name in load_file(saved)) == (0 if mode == "m3po" else 5)


def test_a_model_that_has_a_gate_keeps_the_bounds_that_its_gate_began_with(tiny: Any, tmp_path: Path):
    model = tiny.model()
    attach_residual_gate(model, 0.3, 0.6, seed=1)
    tiny.trainer(tmp_path, flags={"mode": "hrpo"}, model=model).save_model()
    for said in (read_checkpoint_info(tmp_path), json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))):
        assert {name: said[name] for name in EVEN} == EVEN


def test_a_control_is_saved_as_one(tiny: Any, tmp_path: Path):
    run = tiny.trainer(tmp_path, flags={"mode": "none", "max_steps": 1, "cross_path_lambda": 0.3})
    run.save_model()
    info = json.loads((tmp_path / "m3po.json").read_text(encoding="utf-8"))
    assert info["mode"] == "none" and info["sampling_temperature"] == 1.0 and info["answer_start"] == "####"
    assert "cross_path_lambda" not in info
