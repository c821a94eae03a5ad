# SPDX-License-Identifier: Apache-2.0
"""A training that reads the prompt of a group once: the numbers are those of a training that reads every row.

The same rollouts, of prompts of different length and with ragged ends, go through both trainers in each mode.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from reference import hyper_models
from reference.families import FAMILIES
from transformers import TrainerCallback
from transformers.m3po import shared_prefix
from trl import GRPOConfig, GRPOTrainer

BOUND = 1e-4
MARKER = {"answer_start": "#", "thinking_residual_r_min": 0.3, "thinking_residual_r_max": 0.6, "max_grad_norm": 0.0}
STRONG = {"cross_path_lambda": 0.5}
LORA = {"peft_config": LoraConfig(r=2, target_modules="all-linear")}


class Gradients(TrainerCallback):
    """Keeps the gradients of every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        given = model.named_parameters()
        self.steps.append({name: value.grad.clone() for name, value in given if value.grad is not None})


def hyper(kind: str) -> Any:
    """A model with hyper-connections as if trained, of the tiny vocabulary."""
    net = hyper_models.trained(kind, vocab_size=24, tie_word_embeddings=False, bos_token_id=None, eos_token_id=1)
    net.model.embed_tokens.weight.data.mul_(50)
    net.lm_head.weight.data.mul_(15)
    return net


def alike(tiny: Any) -> Dataset:
    """Prompts of different length that begin with the same 20 tokens."""
    return tiny.prompts().map(lambda row: {"prompt": "0123456789abcdef+=?0" + row["prompt"]})


# Cases whose prompts begin alike.
ALIKE = {"none, padding to a multiple", "hrpo", "m3po with ASLR", "luong in h3po", "luong by logits", "LoRA"}
ALIKE |= {"hyper-connections", "m3po, two micro-batches"}
# name: kind of model, flags, what else the trainer is given
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "none, padding to a multiple": ("llama", {"mode": "none", "pad_to_multiple_of": 16}, {}),
    "m3po, two micro-batches": (
        "llama",
        {"mode": "m3po", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "temperature": 0.7},
        {},
    ),
    "hrpo": ("qwen2", {"mode": "hrpo"}, {}),
    "h3po, gradient checkpointing": (
        "llama",
        {"mode": "h3po", "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {},
    ),
    "m3po, reentrant gradient checkpointing": (
        "llama",
        {"mode": "m3po", "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {},
    ),
    "m3po with ASLR": ("qwen2", {"mode": "m3po", "aslr_enabled": True}, {}),
    "none with ASLR": ("llama", {"mode": "none", "aslr_enabled": True}, {}),
    "luong in h3po": ("llama", {"mode": "h3po", "gating_type": "luong"}, {}),
    "bahdanau in m3po": ("qwen2", {"mode": "m3po", "gating_type": "bahdanau"}, {}),
    "luong by logits": ("llama", {"mode": "m3po", "gating_type": "luong", "gating_training": "logits"}, {}),
    "LoRA": ("llama", {"mode": "h3po"}, LORA),
    "LoRA on Qwen2 with a reference and entropies": (
        "qwen2",
        {"mode": "m3po", "beta": 0.1, "top_entropy_quantile": 0.5},
        LORA,
    ),
    "hyper-connections": ("Llama", {"mode": "m3po"}, {}),
    "hyper-connections on Qwen2": ("Qwen2", {"mode": "none"}, {}),
}


def make(tiny: Any, folder: Path, case: str, sharing: str) -> Any:
    """The trainer of a case; all of them have the same weights."""
    kind, flags, given = CASES[case]
    model = {"model": hyper(kind)} if kind[0].isupper() else {}
    if flags.get("aslr_enabled"):
        model = {"model": tiny.with_aslr(kind)}
    torch.manual_seed(0)  # of LoRA's start
    return tiny.trainer(
        folder,
        kind.lower(),
        flags={**MARKER, **STRONG, **flags, "max_steps": 1, "shared_prefix": sharing},
        **model,
        **given,
    )


def trained(run: Any) -> dict[str, torch.Tensor]:
    """Trains; returns the gradients of the one step."""
    kept = Gradients()
    run.add_callback(kept)
    run.train()
    (gradients,) = kept.steps
    return gradients


@pytest.mark.parametrize("case", CASES)
def test_log_gradients_and_loss_are_those_of_the_rows(tiny: Any, tmp_path: Path, case: str):
    rows, shared = (make(tiny, tmp_path, case, sharing) for sharing in ("false", "true"))
    batches = tiny.keep_batches(rows)
    expected = trained(rows)
    tiny.replay(shared, batches)
    given = trained(shared)
    assert given.keys() == expected.keys()
    moved = [name for name, value in expected.items() if value.abs().max() > 0]
    assert moved
    for name, gradient in expected.items():
        assert (given[name] - gradient).abs().max() <= BOUND * gradient.abs().max() + 1e-9, name
    keys = ["loss", "grad_norm", "entropy", "kl", "m3po/rollout_logp_diff_max", "m3po/gating_grad_norm"]
    if "two micro-batches" in case:
        keys.remove("entropy")  # a mean of means, and groups that stay together are shuffled otherwise than rows
    for key in keys:
        both = [tiny.logged(run, key) for run in (rows, shared)]
        assert both[0] == pytest.approx(both[1], rel=1e-3, abs=BOUND), key
    if "by logits" not in case:  # there the policy that is trained is another than the one that was rolled out
        assert tiny.logged(shared, "m3po/rollout_logp_diff_max")[0] < BOUND


@pytest.mark.parametrize("case", CASES)
def test_log_probs_and_entropies_of_each_pass_are_those_of_the_rows(tiny: Any, tmp_path: Path, case: str):
    rows, shared = (make(tiny, tmp_path, case, sharing) for sharing in ("false", "true"))
    inputs = next(iter(rows.get_train_dataloader()))
    rows.model.train(), shared.model.train()
    batch = rows._generate_and_score_completions(inputs)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    number, scored = batch["completion_ids"].size(1), batch["completion_mask"].bool()
    assert (batch["completion_mask"].sum(1) < number).any() and (batch["prompt_mask"] == 0).any()
    for grad in (True, False):  # with gradient a learnable gating function works its weights out again
        values = []
        for run in (rows, shared):
            with torch.set_grad_enabled(grad):
                record = run.m3po.policy_inputs(batch)
                values.append(
                    run._get_per_token_logps_and_entropies(
                        run.model, ids, mask, number, batch_size=4, compute_entropy=True, m3po_inputs=record
                    )[:2]
                )
        for expected, given in zip(*values, strict=True):
            assert given.shape == expected.shape == scored.shape
            torch.testing.assert_close(given[scored], expected[scored], atol=BOUND, rtol=0)


MODES = [("none", {}), ("m3po", {}), ("hrpo", {}), ("h3po", {}), ("m3po", {"aslr_enabled": True})]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of every prefill the rows of the prompts and the columns of the cache; of every shared pass, -1 and K."""
    seen: list[tuple[int, int]] = []
    prefill, share = shared_prefix.shared_prefill, shared_prefix.share_prefix

    def prefilled(model: Any, input_ids: torch.Tensor, *others: Any, **options: bool) -> dict[str, Any]:
        given = prefill(model, input_ids, *others, **options)
        seen.append((len(input_ids), given["past_key_values"].get_seq_length() - input_ids.shape[1]))
        return given

    def shared(*inputs: Any) -> dict[str, Any]:
        stream = share(*inputs)
        seen.append((-1, stream["shared_prefix"].common_length))
        return stream

    monkeypatch.setattr("trl.trainer.m3po.rollouts.shared_prefill", prefilled)
    monkeypatch.setattr("trl.trainer.m3po.sharing.share_prefix", shared)
    return seen


@pytest.mark.parametrize(("mode", "more"), MODES)
@pytest.mark.parametrize("kind", FAMILIES)
def test_rollouts_from_a_shared_prefill_agree_with_the_shared_policy_pass(
    tiny: Any, tmp_path: Path, reads: list[tuple[int, int]], kind: str, mode: str, more: dict[str, Any]
):
    """Prompts of all kinds but Llama begin alike; a micro-batch has one group, which has nothing in common."""
    model = {"model": tiny.with_aslr(kind)} if more else {}
    rows = {"train_dataset": alike(tiny)} if kind != "llama" else {}
    flags = {"num_iterations": 2, "steps_per_generation": 2, "max_steps": 5, "shared_prefix": True}
    flags["per_device_train_batch_size"] = 4 if kind == "llama" else 8
    run = tiny.trainer(tmp_path, kind, flags={**MARKER, "mode": mode, **flags, **more}, **model, **rows)
    run.train()
    size = flags["per_device_train_batch_size"]
    assert [read for read in reads if read[0] > 0] == [(2 * size, -1)] * 2
    common = {length for rows, length in reads if rows < 0}
    assert common == {0} if kind == "llama" else min(common) >= 20
    logged_at = [entry["step"] for entry in run.state.log_history if "m3po/rollout_logp_diff_max" in entry]
    assert logged_at == [1, 5]
    assert max(tiny.logged(run, "m3po/rollout_logp_diff_max")) < BOUND


def test_rollouts_of_an_adapter_are_prefilled_in_the_precision_they_are_decoded_in(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Under autocast a PeftModel's own forward computes in bfloat16, and its `generate` in float32."""
    dtypes: set[torch.dtype] = set()
    prefill = shared_prefix.shared_prefill

    def prefilled(*inputs: Any, **options: bool) -> dict[str, Any]:
        given = prefill(*inputs, **options)
        dtypes.add(given["past_key_values"].layers[0].keys.dtype)
        return given

    monkeypatch.setattr("trl.trainer.m3po.rollouts.shared_prefill", prefilled)
    run = tiny.trainer(tmp_path, flags={**MARKER, "mode": "m3po", "bf16": True, "shared_prefix": "true"}, **LORA)
    run.train()
    assert dtypes == {torch.float32}


def test_an_evaluation_in_a_training_shares_the_prompts_of_its_own_groups(
    tiny: Any, tmp_path: Path, reads: list[tuple[int, int]]
):
    flags = {"per_device_eval_batch_size": 6, "num_generations_eval": 2, "eval_strategy": "steps", "eval_steps": 1}
    run = tiny.trainer(
        tmp_path,
        flags={**MARKER, "mode": "m3po", **flags, "max_steps": 1, "shared_prefix": "true"},
        eval_dataset=tiny.prompts().select(range(3)),
    )
    run.train()
    assert reads == [(8, -1), (-1, 0), (6, -1), (-1, 0)]
    assert max(tiny.logged(run, "eval_m3po/rollout_logp_diff_max")) < BOUND


OBSTACLES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "split groups": (
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {},
        "per_device_train_batch_size=2 does not hold whole groups of num_generations=4",
    ),
    "dropout": (
        {"mode": "none"},
        {"peft_config": LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1)},
        "set lora_dropout to 0",
    ),
    "eager attention": ({}, {"attn_implementation": "eager"}, "attn_implementation is 'eager'"),
    "a sliding window": ({}, {"layer_types": ["full_attention", "sliding_attention"]}, "a sliding window"),
    "positions by the longest row": ({}, {"rope_parameters": {"rope_type": "dynamic"}}, "rope_type 'dynamic'"),
    "noise on the embeddings": ({"neftune_noise_alpha": 5.0}, {}, "neftune_noise_alpha"),
    "a cache of its own": ({"cache_implementation": "static"}, {}, "cache_implementation='static'"),
    "a prompt in parts": ({"generation_kwargs": {"prefill_chunk_size": 4}}, {}, "prefill_chunk_size=4"),
    "no cache": ({"generation_kwargs": {"use_cache": False}}, {}, "use_cache=False"),
    "a penalty": (
        {"mode": "none", "repetition_penalty": 1.1},
        {},
        "RepetitionPenaltyLogitsProcessor looks at the tokens of the prompt",
    ),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_auto_says_why_it_is_off_and_true_is_refused(
    tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
):
    flags, given, why = OBSTACLES[name]
    config = {key: value for key, value in given.items() if key != "peft_config"}
    given = {key: value for key, value in given.items() if key == "peft_config"}

    def build(sharing: str) -> Any:
        net = tiny.model("qwen2" if "layer_types" in config else "llama")
        if "attn_implementation" in config:
            net.set_attn_implementation(config["attn_implementation"])
        elif config:
            net.config.update(config)
        return tiny.trainer(
            tmp_path, flags={**MARKER, "mode": "m3po", **flags, "shared_prefix": sharing}, model=net, **given
        )

    run = build("auto")
    assert not run.m3po.shares_prefix
    assert "; shared_prefix=auto: off, " in run.m3po.describe() and why in run.m3po.describe()
    with pytest.raises(ValueError, match=f"shared_prefix='true' is not possible here: .*{why}"):
        build("true")


def test_the_first_lines_of_a_control_say_that_it_is_on(tiny: Any, tmp_path: Path):
    run = tiny.trainer(tmp_path, flags={"mode": "none", "shared_prefix": "auto"})
    assert run.m3po.describe() == "mode=none; shared_prefix=auto: on, a prompt is read once for its 4 paths"
    assert tiny.trainer(tmp_path, flags={"mode": "none"}).m3po.describe() == "mode=none"


def test_a_group_with_two_prompts_is_refused(tiny: Any, tmp_path: Path):
    run = tiny.trainer(tmp_path, flags={"mode": "none", "shared_prefix": "true"})
    run.model.train()
    ids = torch.tensor([[5, 6, 7]] * 5 + [[5, 6, 8]] + [[5, 6, 7]] * 2)
    with pytest.raises(ValueError, match="row 5 of the rollout has another prompt than the other"):
        run.m3po.add_to_batch({"prompt_ids": ids})


def test_a_trainer_that_splits_rollouts_itself_is_left_alone(tiny: Any, tmp_path: Path):
    class Splits(GRPOTrainer):
        def _prepare_inputs(self, generation_batch: Any) -> Any:
            return super()._prepare_inputs(generation_batch)

    plain = tiny.trainer(tmp_path, flags={"mode": "none"})
    args = GRPOConfig(str(tmp_path), **{**tiny.FLAGS, "mode": "none", "shared_prefix": "auto"})
    run = Splits(plain.model, tiny.reward, args, tiny.prompts(), processing_class=tiny.tokenizer())
    assert run.m3po.describe().endswith("shared_prefix=auto: off, Splits splits rollouts in its own way")


def test_another_word_is_refused(tiny: Any, tmp_path: Path):
    with pytest.raises(ValueError, match="shared_prefix='maybe' is unknown; set one of auto, true, false"):
        tiny.trainer(tmp_path, flags={"shared_prefix": "maybe"})
