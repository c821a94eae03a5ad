# SPDX-License-Identifier: Apache-2.0
"""Real runs of GRPO whose rollouts vLLM decodes: the policy pass scores what the engine has sampled, in every step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_grpo
import torch
from peft import LoraConfig
from trl import GRPOTrainer
from trl.trainer.m3po.vllm_rollouts import RolloutRefused
from vllm_engine import shut_down

SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}  # vLLM's least head
STRONG = {"cross_path_lambda": 0.5, "thinking_residual_r_min": 0.3, "thinking_residual_r_max": 0.6}
RATES = {"thinking_residual_gate_learning_rate": 1e-2, "gating_learning_rate": 1e-2}
LENGTH = 24
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("llama", {}),
    "m3po": ("qwen2", {}),
    "hrpo": ("llama", {}),
    "h3po": ("qwen3", {"shared_prefix": "auto"}),
    "m3po, a gate that learns": ("llama", {"gating_type": "luong", "gating_config": {"rank": 4}}),
    "m3po, a gate on embeddings": (
        "qwen2",
        {"gating_type": "bahdanau", "gating_config": {"attention_dim": 4, "project_embeddings": True}},
    ),
    "m3po, another group": ("llama", {"gating_type": "shuffled", "vllm_max_model_length": 64}),
    "m3po, logits": ("llama", {"gating_type": "luong", "gating_config": {"rank": 4}, "gating_training": "logits"}),
    "hrpo, LoRA": ("qwen2", {"num_iterations": 2}),
}


@pytest.fixture
def trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`trains(case, **flags)`: a trainer; the engine of the last one is shut down behind the test."""
    monkeypatch.setattr(tiny_grpo, "SIZES", {**tiny_grpo.SIZES, **SIZES})
    made: list[GRPOTrainer] = []

    def make(case: str, lora: LoraConfig | None = None, **flags: Any) -> GRPOTrainer:
        kind, own = CASES[case]
        mode = case.partition(",")[0]
        given = {
            "mode": mode,
            "rollout_engine": "vllm",
            "max_steps": 3,
            "max_completion_length": LENGTH,
            **STRONG,
            **RATES,
            **own,
            **flags,
        }
        if case.endswith("LoRA") and lora is None:
            lora = LoraConfig(r=4, target_modules="all-linear")
        made.append(tiny_grpo.trainer(tmp_path, kind, flags=given, peft_config=lora))
        return made[-1]

    yield make
    if made:
        shut_down(made[-1].vllm_generation.llm)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # TRL sets them for vLLM; the next trainer would start DDP
        os.environ.pop(name, None)


@pytest.mark.parametrize("case", CASES)
def test_the_policy_pass_scores_what_the_engine_has_sampled(trains: Any, case: str):
    run = trains(case)
    run.train()
    # With two passes over a rollout only the first has the weights of the rollout.
    differences = tiny_grpo.logged(run, "m3po/rollout_logp_diff_max")
    assert len(differences) >= 2
    if not case.endswith("logits"):  # that is another policy than the one that is rolled out
        assert max(differences) < 1e-4
    assert min(tiny_grpo.logged(run, "completions/min_length")) < LENGTH, "ragged ends"
    if case.startswith(("m3po", "h3po")):
        assert 1 <= tiny_grpo.logged(run, "m3po/active_paths")[0] <= run.num_generations
        assert tiny_grpo.logged(run, "m3po/attention_entropy")[0] > 0
    if case.startswith(("hrpo", "h3po")):
        assert tiny_grpo.logged(run, "m3po/embeds_ratio")[0] < 1


def test_weights_that_are_not_handed_on_are_seen(trains: Any):
    run = trains("m3po")
    hand_on, calls = run.vllm_generation.sync_weights, []
    run.vllm_generation.sync_weights = lambda: calls.append(1) or (len(calls) == 1 and hand_on())
    run.train()
    first, *later = tiny_grpo.logged(run, "m3po/rollout_logp_diff_max")
    assert first < 1e-4 and min(later) > 1e-2 and len(calls) == 3


def test_a_resumed_run_has_the_tokens_and_the_weights_of_the_uninterrupted_one(trains: Any, tmp_path: Path):
    flags = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trains("m3po", **flags)
    kept = tiny_grpo.keep_batches(whole)
    whole.train()
    weights = {name: value.clone() for name, value in whole.model.state_dict().items()}
    shut_down(whole.vllm_generation.llm)
    torch.manual_seed(12345)
    resumed = trains("m3po", **flags)
    later = tiny_grpo.keep_batches(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(kept) == 4 and len(later) == 2
    for one, other in zip(kept[2:], later, strict=True):
        assert torch.equal(one["completion_ids"], other["completion_ids"])
        assert torch.equal(one["rollout_bag_ids"], other["rollout_bag_ids"])
    assert all(torch.equal(value, resumed.model.state_dict()[name]) for name, value in weights.items())


def test_prompts_that_are_too_long_to_begin_together_are_one_line(trains: Any):
    run = trains("m3po")
    run.vllm_generation.m3po._most_tokens = 40
    with pytest.raises(
        RolloutRefused, match=r"4 of them are read in one step, in which this engine reads 40: set vllm_max"
    ):
        run.train()


def test_a_group_that_the_cache_cannot_hold_is_one_line(trains: Any):
    run = trains("m3po")
    scheduler = run.vllm_generation.llm.llm_engine.engine_core.engine_core.scheduler
    scheduler.kv_cache_config.num_blocks = 2
    with pytest.raises(RolloutRefused, match=r"4 paths .* need \d+ blocks of the cache, .*raise VLLM_CPU_KV"):
        run.train()


def test_an_adapter_that_parts_head_and_embeddings_is_refused(trains: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(tiny_grpo.SIZES, "tie_word_embeddings", True)
    adapter = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"the adapter trains lm_head of a model whose head and embeddings are one"):
        trains("hrpo, LoRA", adapter)


def test_a_model_with_modules_that_vllm_lacks_is_refused(trains: Any, monkeypatch: pytest.MonkeyPatch):
    model = tiny_grpo.with_aslr()
    monkeypatch.setattr(tiny_grpo, "model", lambda kind: model)
    with pytest.raises(
        ValueError, match=r"rollout_engine='vllm': the model has ASLR, which vLLM's forward has not; set"
    ):
        trains("none")
