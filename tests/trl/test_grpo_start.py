# SPDX-License-Identifier: Apache-2.0
"""What the trainer refuses before any work, and that the control runs wherever upstream's trainer does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GemmaConfig, GemmaForCausalLM, GPT2Config, GPT2LMHeadModel

# A template that can write a call of a tool and its answer, as TRL asks of it.
TOOL_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}:{{ message['content'] or '' }}"
    "{% for call in message.get('tool_calls') or [] %}{{ call['function']['name'] }}"
    "{{ call['function']['arguments'] | tojson }}{% endfor %};{% endfor %}"
)


def add(a: int, b: int) -> int:
    """Adds.

    Args:
        a: a number.
        b: a number.
    """
    return a + b


def other_family(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=24, n_embd=32, n_layer=2, n_head=4, eos_token_id=1))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return GemmaForCausalLM(GemmaConfig(vocab_size=24, eos_token_id=1, pad_token_id=0, **sizes, **heads))


@pytest.mark.parametrize("kind", ["gpt2", "gemma"])
def test_a_family_without_the_hook_is_refused_by_name(tiny: Any, tmp_path: Path, kind: str):
    with pytest.raises(ValueError, match=f"mode='m3po' is built into llama, qwen2 models; this one is '{kind}'. Set"):
        tiny.trainer(tmp_path, flags={"mode": "m3po"}, model=other_family(kind))


@pytest.mark.parametrize("kind", ["gpt2", "gemma"])
def test_a_family_without_the_hook_still_trains_as_a_control(tiny: Any, tmp_path: Path, kind: str):
    run = tiny.trainer(tmp_path, flags={"mode": "none"}, model=other_family(kind))
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.train()
    assert all(map(math.isfinite, tiny.logged(run, "loss")))
    assert any(not torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert len(tiny.logged(run, "m3po/rollout_logp_diff")) == 2


def test_rollouts_from_a_function_are_refused(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    with pytest.raises(ValueError, match="^rollout_func cannot be combined with mode='m3po'.*[Ll]eave it out"):
        tiny.trainer(tmp_path, flags={"mode": "m3po"}, rollout_func=lambda prompts, trainer: {})


def test_tools_are_refused(tiny: Any, tmp_path: Path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    tokenizer.response_schema = {"type": "object", "properties": {"content": {"type": "string"}}}
    with pytest.raises(ValueError, match="^tools cannot be combined with mode='m3po'.*[Ll]eave it out"):
        tiny.trainer(tmp_path, flags={"mode": "m3po"}, tools=[add], processing_class=tokenizer)


def test_assisted_decoding_is_refused_at_the_start(tiny: Any, tmp_path: Path):
    flags = {"mode": "m3po", "generation_kwargs": {"prompt_lookup_num_tokens": 2}}
    with pytest.raises(ValueError, match="^generation_kwargs has prompt_lookup_num_tokens"):
        tiny.trainer(tmp_path, flags=flags)


def test_a_control_may_decode_with_beams_as_upstream_does(tiny: Any, tmp_path: Path):
    run = tiny.trainer(tmp_path, flags={"mode": "none", "generation_kwargs": {"num_beams": 2}})
    run.train()
    assert all(map(math.isfinite, tiny.logged(run, "loss")))
    assert not [key for entry in run.state.log_history for key in entry if key.startswith("m3po/")]


def test_a_control_may_take_its_rollouts_from_a_function(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
        ids = tiny.tokenizer()(prompts)["input_ids"]
        completions = [[2 + (k + row[-1]) % 8 for k in range(3 + i % 2)] for i, row in enumerate(ids)]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}

    run = tiny.trainer(tmp_path, flags={"mode": "none"}, rollout_func=rollouts)
    run.train()
    assert all(map(math.isfinite, tiny.logged(run, "loss")))


def test_an_evaluation_in_batches_of_split_groups_is_refused(tiny: Any, tmp_path: Path):
    run = tiny.trainer(tmp_path, flags={"mode": "m3po", "per_device_eval_batch_size": 6}, eval_dataset=tiny.prompts())
    with pytest.raises(ValueError, match="^6 rollouts at a time are not whole groups of 4: make per_device_eval_batch"):
        run.evaluate()


def test_the_start_of_a_run_says_its_mode_and_numbers_in_one_line(
    tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level("INFO", logger="trl.trainer.grpo_m3po"):
        tiny.trainer(tmp_path, flags={"mode": "m3po", "cross_path_lambda": 0.2})
        tiny.trainer(tmp_path, flags={"mode": "none"})
    said = [record.getMessage() for record in caplog.records if record.name == "trl.trainer.grpo_m3po"]
    assert said == [
        "mode=m3po: lambda=0.2, temperature=0.1, gate=baseline, phase=thinking, answer marker '####'",
        "mode=none",
    ]
