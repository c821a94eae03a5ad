# SPDX-License-Identifier: Apache-2.0
"""What the trainer refuses before any work, and that the control runs wherever upstream's trainer does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from reference.families import FAMILIES
from transformers import GemmaConfig, GemmaForCausalLM, GPT2Config, GPT2LMHeadModel
from trl import GRPOConfig, GRPOTrainer

# A template that can write a call of a tool and its answer, as TRL asks of it.
TOOL_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}:{{ message['content'] or '' }}"
    "{% for call in message.get('tool_calls') or [] %}{{ call['function']['name'] }}"
    "{{ call['function']['arguments'] | tojson }}{% endfor %};{% endfor %}"
)


BUILT_INTO = ", ".join(FAMILIES)

# What needs rollouts of one call of generate, as a message names it.
NEEDS_GENERATE = [({"mode": "m3po"}, "mode='m3po'"), ({"aslr_enabled": True}, "aslr_enabled=True")]


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


@pytest.mark.parametrize("mode", ["m3po", "hrpo", "h3po"])
@pytest.mark.parametrize("kind", ["gpt2", "gemma"])
def test_a_family_without_the_hook_is_refused_by_name(tiny: Any, tmp_path: Path, kind: str, mode: str):
    model = other_family(kind)
    with pytest.raises(ValueError, match=f"mode='{mode}' is built into {BUILT_INTO} models; this one is '{kind}'. Set"):
        tiny.trainer(tmp_path, flags={"mode": mode}, model=model)
    assert not any("thinking_residual" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("kind", ["gpt2", "gemma"])
def test_a_family_without_the_hook_is_refused_by_aslr_in_the_control_too(tiny: Any, tmp_path: Path, kind: str):
    model = other_family(kind)
    said = (
        f"^aslr_enabled=True is built into {BUILT_INTO} models; this one is '{kind}'. Leave it out, take another model"
    )
    with pytest.raises(ValueError, match=said):
        tiny.trainer(tmp_path, flags={"aslr_enabled": True}, model=model)
    assert not any("m3po_" in name for name, _ in model.named_modules())


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
    for flags, what in NEEDS_GENERATE:
        with pytest.raises(ValueError, match=f"^rollout_func cannot be combined with {what}.*[Ll]eave it out"):
            tiny.trainer(tmp_path, flags=flags, rollout_func=lambda prompts, trainer: {})


def test_tools_are_refused(tiny: Any, tmp_path: Path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    tokenizer.response_schema = {"type": "object", "properties": {"content": {"type": "string"}}}
    for flags, what in NEEDS_GENERATE:
        with pytest.raises(ValueError, match=f"^tools cannot be combined with {what}.*[Ll]eave it out"):
            tiny.trainer(tmp_path, flags=flags, tools=[add], processing_class=tokenizer)


def test_assisted_decoding_is_refused_at_the_start(tiny: Any, tmp_path: Path):
    flags = {"mode": "m3po", "generation_kwargs": {"prompt_lookup_num_tokens": 2}}
    with pytest.raises(ValueError, match="^generation_kwargs has prompt_lookup_num_tokens"):
        tiny.trainer(tmp_path, flags=flags)


@pytest.mark.parametrize("given", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}], ids=["beams", "an assistant"])
def test_aslr_in_a_control_refuses_a_decoding_that_records_no_seeds(tiny: Any, tmp_path: Path, given: dict[str, int]):
    flags = {"generation_kwargs": given}
    said = "^generation_kwargs cannot be combined with aslr_enabled=True.*seeds.*or train without ASLR"
    for more, model in (({"aslr_enabled": True}, tiny.model()), ({}, tiny.with_aslr())):
        with pytest.raises(ValueError, match=said):
            tiny.trainer(tmp_path, flags={**flags, **more}, model=model)


def test_continuous_batching_is_refused_for_a_model_that_brings_aslr(tiny: Any, tmp_path: Path):
    """The config cannot know: `aslr_enabled` is left open and becomes the model's."""
    with pytest.raises(ValueError, match="^use_transformers_continuous_batching cannot be .* aslr_enabled=True"):
        tiny.trainer(tmp_path, flags={"use_transformers_continuous_batching": True}, model=tiny.with_aslr())


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


@pytest.mark.parametrize(
    ("flags", "of_the_model", "processor"),
    [
        ({"top_k": None}, {}, "TopKLogitsWarper"),  # upstream's default is 50
        ({"top_k": None}, {"top_k": 5}, "TopKLogitsWarper"),
        ({"top_p": None}, {"top_p": 0.8}, "TopPLogitsWarper"),
        ({}, {"min_p": 0.2}, "MinPLogitsWarper"),
        ({"repetition_penalty": None}, {"repetition_penalty": 1.1}, "RepetitionPenaltyLogitsProcessor"),
        ({}, {"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor"),
        ({}, {"min_new_tokens": 3}, "MinNewTokensLengthLogitsProcessor"),
        ({}, {"suppress_tokens": [3]}, "SuppressTokensLogitsProcessor"),
    ],
)
def test_what_the_models_own_configuration_would_cut_off_is_refused(
    tiny: Any, tmp_path: Path, flags: dict[str, Any], of_the_model: dict[str, Any], processor: str
):
    """Fields left None are filled from the model's generation_config: the policy pass would see another policy."""
    model = tiny.model()
    model.generation_config.update(**of_the_model)
    with pytest.raises(ValueError, match=f"^{processor} would change the distribution.*top_k=0") as error:
        tiny.trainer(tmp_path, flags={"mode": "m3po", **flags}, model=model)
    assert "\n" not in str(error.value)
    tiny.trainer(tmp_path, flags={"mode": "none", **flags}, model=model)  # the control is upstream's


def test_a_min_p_of_zero_cuts_nothing_off_and_is_accepted(tiny: Any, tmp_path: Path):
    model = tiny.model()
    model.generation_config.min_p = 0.2
    tiny.trainer(tmp_path, flags={"mode": "m3po", "min_p": 0.0}, model=model)


def test_the_models_own_configuration_cannot_turn_a_control_into_m3po(tiny: Any, tmp_path: Path):
    model = tiny.model()
    model.generation_config.update(enable_cross_path=True, cross_path_lambda=0.5, return_thinking_embeds=True)
    run = tiny.trainer(tmp_path, flags={"mode": "none"}, model=model)
    run.train()
    assert not tiny.logged(run, "m3po/attention_max") and len(tiny.logged(run, "m3po/rollout_logp_diff")) == 2


def test_a_trainer_that_scores_in_its_own_way_is_refused(tiny: Any, tmp_path: Path):
    """It would roll out with bags and score without them, and nothing would be logged."""

    class Own(GRPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            return super()._compute_loss(model, inputs)

    given = {"model": tiny.model(), "reward_funcs": tiny.reward, "train_dataset": tiny.prompts()}
    given["processing_class"] = tiny.tokenizer()
    Own(args=GRPOConfig(output_dir=str(tmp_path), mode="none", **tiny.FLAGS), **given)
    for flags, what in NEEDS_GENERATE:
        args = GRPOConfig(output_dir=str(tmp_path), **flags, **tiny.FLAGS)
        said = f"^Own has its own _compute_loss, which does not hand the (bags|seeds) of {what} to .*take GRPOTrainer"
        with pytest.raises(ValueError, match=said):
            Own(args=args, **given)

    class Aware(GRPOTrainer):
        carries_rollout_record = True

        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            return super()._compute_loss(model, inputs)

    Aware(args=args, **given)


@pytest.mark.parametrize("where", ["adapter", "model"])
def test_dropout_is_refused(tiny: Any, tmp_path: Path, where: str):
    """Rollout and policy pass would draw different masks: 1e-2 apart in log-prob was seen with LoRA's default."""
    given: dict[str, Any] = {"model": tiny.model()}
    if where == "adapter":
        given["peft_config"] = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.05)
    else:
        given["model"].config.attention_dropout = 0.1
    with pytest.raises(ValueError, match="^dropout draws other numbers.*lora_dropout to 0"):
        tiny.trainer(tmp_path, flags={"mode": "m3po"}, **given)
    if where == "adapter":
        given["model"] = tiny.model()
        tiny.trainer(tmp_path, flags={"mode": "m3po", "disable_dropout": True}, **given)


def test_the_start_of_a_run_says_its_mode_and_numbers_in_one_line(
    tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level("INFO", logger="trl.trainer.m3po.rollouts"):
        tiny.trainer(tmp_path, flags={"mode": "m3po", "cross_path_lambda": 0.2})
        tiny.trainer(tmp_path, flags={"mode": "none"})
        tiny.trainer(tmp_path, flags={"aslr_enabled": True, "aslr_threshold": 0.25})
    said = [record.getMessage() for record in caplog.records if record.name == "trl.trainer.m3po.rollouts"]
    assert said == [
        "mode=m3po: lambda=0.2, temperature=0.1, gating_type=baseline, phase=thinking, answer marker '####'",
        "mode=none",
        "mode=none; ASLR: aslr_num_paths=4, aslr_max_iterations=2, aslr_threshold=0.25, aslr_gumbel_temp=1.0, "
        "aslr_cross_path_lambda=0.1, aslr_cross_path_temp=0.1",
    ]
