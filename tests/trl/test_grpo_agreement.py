# SPDX-License-Identifier: Apache-2.0
"""Rollout and policy pass agree, and every scoring pass gets the bags of its own rows.

One battery for all modes. The residual gate starts here with a decay of 0.3 to 0.6: half of a thinking input is the
thought, where HRPO's own start leaves it a fourteenth.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from reference.families import FAMILIES
from transformers.m3po.gating import list_gating_functions, list_placebos
from transformers.m3po.thinking.residual_gate import attach_residual_gate

# The largest difference of log-probs, in fp32, that rounding explains.
BOUND = 1e-4
MARKER = {"answer_start": "#", "thinking_residual_r_min": 0.3, "thinking_residual_r_max": 0.6}
CROSSING, THINKING = ("m3po", "h3po"), ("hrpo", "h3po")
# The forward of Qwen2 calls the same hook as Llama's, in every mode.
MODES = [("m3po", "llama"), ("hrpo", "llama"), ("h3po", "qwen2")]


def with_reference(tiny: Any, folder: Path, kind: str) -> dict[str, Any]:
    """The tiny model as one that was loaded from disk, where TRL looks for the reference model."""
    net = tiny.model(kind)
    net.save_pretrained(folder / "start")
    return {"model": type(net).from_pretrained(folder / "start")}


# name: flags, and the steps whose policy pass has the weights of the rollout. Each has several flags that do not touch
# each other, so that few runs meet all of them.
CASES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "one batch": ({}, [1, 2]),
    "gradient accumulation, padding to a multiple, another temperature": (
        {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "pad_to_multiple_of": 16,
            "temperature": 0.7,
        },
        [1, 2],
    ),
    "one rollout for several steps, truncated completions masked": (
        {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "steps_per_generation": 4,
            "max_steps": 4,
            "mask_truncated_completions": True,
        },
        [1, 3],
    ),
    "two iterations over several steps, gradient checkpointing": (
        {
            "per_device_train_batch_size": 4,
            "num_iterations": 2,
            "steps_per_generation": 2,
            "max_steps": 5,
            "gradient_checkpointing": True,
        },
        [1, 5],
    ),
    "several rollouts for a step, thinking to the end": (
        {
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 4,
            "steps_per_generation": 2,
            "cross_path_phase": "all",
        },
        [1, 2],
    ),
    "two peers of three": ({"cross_path_top_k": 2, "answer_start": "####"}, [1, 2]),
    "half from the peers": ({"cross_path_lambda": 0.5, "cross_path_temp": 1.0}, [1, 2]),
    "three entries of a thought": ({"thought_top_k": 3}, [1, 2]),
    "the whole vocabulary": ({"thought_top_k": 0}, [1, 2]),
}
ONLY = {
    "two peers of three": ("m3po",),
    "half from the peers": ("h3po",),
    "three entries of a thought": ("h3po",),
    "the whole vocabulary": THINKING,
}
BATTERY = [(case, mode, "llama") for case in CASES for mode in ONLY.get(case, ("m3po", "hrpo", "h3po"))]
# The forwards of the other families call the same hooks as Llama's, in every mode.
OTHERS = [family for family in FAMILIES if family != "llama"]
BATTERY += [
    (case, mode, family)
    for family in OTHERS
    for case, mode in zip([*CASES][2:5], ("m3po", "hrpo", "h3po"), strict=True)
]


def check_agreement(tiny: Any, run: Any, expected_steps: list[int]) -> None:
    """The run thought, had ragged stops, and its largest difference stays below the bound at the expected steps."""
    logged_at = [entry["step"] for entry in run.state.log_history if "m3po/rollout_logp_diff_max" in entry]
    assert logged_at == expected_steps
    assert max(tiny.logged(run, "m3po/rollout_logp_diff_max")) < BOUND
    crosses, thinks = (run.args.mode in modes for modes in (CROSSING, THINKING))
    assert (max(tiny.logged(run, "m3po/attention_max"), default=0) > 0) == crosses
    assert (max(tiny.logged(run, "m3po/hidden_ratio"), default=0) > 0.5) == thinks
    assert 0 < tiny.logged(run, "completions/clipped_ratio")[0] < 1
    assert tiny.logged(run, "completions/min_length")[0] < tiny.logged(run, "completions/max_length")[0]


@pytest.mark.parametrize(("case", "mode", "kind"), BATTERY)
def test_rollout_and_policy_pass_agree_for_equal_weights(tiny: Any, tmp_path: Path, case: str, mode: str, kind: str):
    flags, expected_steps = CASES[case]
    run = tiny.trainer(tmp_path, kind, flags={**MARKER, "mode": mode, **flags})
    run.train()
    check_agreement(tiny, run, expected_steps)


@pytest.mark.parametrize(
    ("gate", "mode"),
    [
        (gate, CROSSING[k % 2])
        for k, gate in enumerate([*list_gating_functions(), *list_placebos()])
        if gate != "baseline"
    ],
)
def test_they_agree_with_every_gate(tiny: Any, tmp_path: Path, gate: str, mode: str):
    flags = {**MARKER, "mode": mode, "gating_type": gate, "cross_path_lambda": 0.5}
    run = tiny.trainer(tmp_path, flags=flags)
    run.train()
    check_agreement(tiny, run, [1, 2])


@pytest.mark.parametrize(("kind", "gate"), [("qwen3", "luong"), ("qwen3", "bahdanau"), ("smollm3", "luong")])
def test_other_families_agree_with_gates_that_learn(tiny: Any, tmp_path: Path, kind: str, gate: str):
    run = tiny.trainer(tmp_path, kind, flags={**MARKER, "mode": "m3po", "gating_type": gate, "cross_path_lambda": 0.5})
    before = {name: value.clone() for name, value in run.model.named_parameters() if "gating" in name}
    run.train()
    assert max(tiny.logged(run, "m3po/rollout_logp_diff_max")) < BOUND
    assert max(tiny.logged(run, "m3po/attention_max")) > 0
    after = dict(run.model.named_parameters())
    assert before and any(not torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(("mode", "kind"), MODES)
def test_they_agree_with_a_reference_model_whose_kl_starts_at_zero(tiny: Any, tmp_path: Path, mode: str, kind: str):
    flags = {**MARKER, "mode": mode, "beta": 0.1}
    run = tiny.trainer(tmp_path, kind, flags=flags, **with_reference(tiny, tmp_path, kind))
    run.train()
    check_agreement(tiny, run, [1, 2])
    first, second = tiny.logged(run, "kl")
    assert first < 1e-8 < 1e-6 < second


@pytest.mark.parametrize(("mode", "kind"), MODES)
def test_they_agree_under_lora_with_the_adapter_off_in_the_reference_pass(
    tiny: Any, tmp_path: Path, mode: str, kind: str
):
    run = tiny.trainer(
        tmp_path,
        kind,
        flags={**MARKER, "mode": mode, "beta": 0.1, "max_steps": 3},
        peft_config=LoraConfig(target_modules="all-linear"),
    )
    run.train()
    check_agreement(tiny, run, [1, 2, 3])
    kl = tiny.logged(run, "kl")
    assert kl[0] < 1e-8 < 1e-6 < kl[2]  # the adapter starts as nothing and is off in the reference pass


@pytest.mark.parametrize("mode", CROSSING)
def test_they_agree_from_a_saved_adapter_which_is_then_the_reference(tiny: Any, tmp_path: Path, mode: str):
    flags = {**MARKER, "mode": mode, "beta": 0.1}
    first = tiny.trainer(
        tmp_path, flags={**flags, "max_steps": 1}, peft_config=LoraConfig(r=4, target_modules="all-linear")
    )
    first.train()
    first.save_model(str(tmp_path / "adapter"))
    base = tiny.model()
    if mode in THINKING:
        attach_residual_gate(base, 0.3, 0.6, seed=99)  # another gate: with the adapter off, the policy is another one
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    run = tiny.trainer(tmp_path, flags=flags, model=loaded)
    run.train()
    check_agreement(tiny, run, [1, 2])
    before, after = tiny.logged(run, "kl")
    assert before < 1e-8 < 1e-6 < after


@pytest.mark.parametrize(
    ("mode", "flags"),
    [("m3po", {"num_iterations": 2, "max_steps": 4}), ("h3po", {})],
)
def test_they_agree_when_evaluations_lie_between_the_steps(tiny: Any, tmp_path: Path, mode: str, flags: dict[str, Any]):
    run = tiny.trainer(
        tmp_path,
        flags={
            **MARKER,
            "mode": mode,
            **flags,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "per_device_eval_batch_size": 4,
            "num_generations_eval": 2,
        },
        eval_dataset=tiny.prompts().select(range(3)),  # 6 rollouts: the second batch is short
    )
    run.train()
    check_agreement(tiny, run, [1, 3] if flags else [1, 2])
    evaluated = tiny.logged(run, "eval_m3po/rollout_logp_diff_max")
    assert len(evaluated) == run.state.global_step and 0 < max(evaluated) < BOUND
    assert mode == "hrpo" or max(tiny.logged(run, "eval_m3po/active_paths")) <= 2


@pytest.mark.parametrize(("mode", "kind"), MODES)
def test_the_difference_jumps_when_the_bags_are_withheld_from_the_policy_pass(
    tiny: Any, tmp_path: Path, mode: str, kind: str
):
    run = tiny.trainer(tmp_path, kind, flags={**MARKER, "mode": mode})
    loss = run._compute_loss
    run._compute_loss = lambda model, inputs: loss(
        model, {name: value for name, value in inputs.items() if not name.startswith("rollout_bag")}
    )
    run.train()
    assert min(tiny.logged(run, "m3po/rollout_logp_diff_max")) > 100 * BOUND


def spy(run: Any) -> tuple[dict[str, list[dict[str, Any]]], dict[str, set[int]]]:
    """Per scoring pass (policy, old, reference): the rows that reached the base model, and whose embeddings mixed."""
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    embeddings: dict[str, set[int]] = defaultdict(set)
    score, running = run._get_per_token_logps_and_entropies, []

    def named_pass(model: Any, *args: Any, **kwargs: Any) -> Any:
        running.append("reference" if model is run.ref_model else "policy" if torch.is_grad_enabled() else "old")
        try:
            return score(model, *args, **kwargs)
        finally:
            running.pop()

    def before_base(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        if running:
            names = ("input_ids", "attention_mask", "position_ids", "thinking_bag_ids", "thinking_bag_weights")
            passed = [kwargs[name].clone() for name in names]
            rows[running[-1]] += [dict(zip(names, row, strict=True)) for row in zip(*passed, strict=True)]

    def before_embedding(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        if running and args[0].ndim == 3:
            embeddings[running[-1]].add(id(module))

    run._get_per_token_logps_and_entropies = named_pass
    for net in (run.model, run.ref_model):
        net.model.register_forward_pre_hook(before_base, with_kwargs=True)
        net.model.embed_tokens.register_forward_pre_hook(before_embedding)
    return rows, embeddings


@pytest.mark.parametrize(("mode", "kind"), MODES)
def test_policy_old_and_reference_pass_get_the_bags_of_their_own_rows(tiny: Any, tmp_path: Path, mode: str, kind: str):
    flags = {**MARKER, "mode": mode, "beta": 0.1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    run = tiny.trainer(tmp_path, kind, flags={**flags, "num_iterations": 2}, **with_reference(tiny, tmp_path, kind))
    rows, embeddings = spy(run)
    run.train()
    assert {name: len(seen) for name, seen in rows.items()} == {"old": 8, "reference": 8, "policy": 16}
    by_text = {tuple(row["input_ids"].tolist()): row for row in rows["old"]}
    assert len(by_text) == 8
    for row in rows["policy"] + rows["reference"]:
        twin = by_text[tuple(row["input_ids"].tolist())]
        for name in ("position_ids", "thinking_bag_ids", "thinking_bag_weights"):
            assert torch.equal(row[name], twin[name]), name
    assert embeddings["policy"] == embeddings["old"] == {id(run.model.model.embed_tokens)}
    assert embeddings["reference"] == {id(run.ref_model.model.embed_tokens)}


def test_a_bag_starts_with_the_rows_own_token_and_the_positions_leave_out_the_padding(tiny: Any, tmp_path: Path):
    run = tiny.trainer(
        tmp_path,
        flags={**MARKER, "mode": "m3po", "beta": 0.1, "pad_to_multiple_of": 8},
        **with_reference(tiny, tmp_path, "llama"),
    )
    rows, _ = spy(run)
    run.train()
    blended = 0
    for row in rows["policy"]:
        ids, weights = row["thinking_bag_ids"], row["thinking_bag_weights"]
        assert ids.dtype == torch.int32 and weights.dtype == torch.float32 and ids.shape == weights.shape
        assert ids.shape == (16, 4)  # 12 completion tokens at most, padded to a multiple of 8; groups of 4
        has_bag = (weights > 0).any(-1)
        assert torch.equal(ids[has_bag, 0].long(), row["input_ids"][-16:][has_bag])
        torch.testing.assert_close(weights[has_bag, 0], torch.full_like(weights[has_bag, 0], 0.9))
        torch.testing.assert_close(weights[has_bag].sum(-1), torch.ones(int(has_bag.sum())))
        assert not (has_bag & ~row["attention_mask"][-16:].bool()).any()
        real = row["attention_mask"].bool()
        assert row["position_ids"][real].tolist() == list(range(int(real.sum())))
        blended += int(has_bag.sum())
    assert blended > 20
    assert any(row["attention_mask"][0] == 0 for row in rows["policy"])  # left padding was there


@pytest.mark.parametrize("mode", CROSSING)
def test_old_log_probs_are_the_rollouts(tiny: Any, tmp_path: Path, mode: str):
    run = tiny.trainer(tmp_path, flags={**MARKER, "mode": mode, "num_iterations": 2})
    loss, differences = run._compute_loss, []

    def compare(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        difference = inputs["old_per_token_logps"] - inputs["rollout_logps"]
        differences.append((difference * inputs["completion_mask"]).abs().max().item())
        return loss(model, inputs)

    run._compute_loss = compare
    run.train()
    assert len(differences) == 2 and 0 < max(differences) < BOUND


@pytest.mark.parametrize("mode", ["h3po"])
def test_one_large_batch_and_four_small_ones_give_the_same_gradient(tiny: Any, tmp_path: Path, mode: str):
    runs = []
    for size, accumulation in ((8, 1), (2, 4)):
        flags = {
            **MARKER,
            "mode": mode,
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulation,
            "optim": "sgd",
            "learning_rate": 0.1,
        }
        run = tiny.trainer(tmp_path, flags=flags)
        run.train()
        runs.append(run)
    large, small = runs
    assert tiny.logged(large, "completions/mean_length") == tiny.logged(small, "completions/mean_length")
    torch.testing.assert_close(
        torch.tensor(tiny.logged(large, "grad_norm")), torch.tensor(tiny.logged(small, "grad_norm")), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(
        torch.tensor(tiny.logged(large, "loss")), torch.tensor(tiny.logged(small, "loss")), rtol=1e-4, atol=1e-6
    )
    fresh = tiny.trainer(tmp_path, flags={**MARKER, "mode": mode}).model
    start = fresh.state_dict()
    for name, weight in large.model.state_dict().items():
        torch.testing.assert_close(weight, small.model.state_dict()[name], rtol=0, atol=1e-6, msg=name)
        assert "norm" in name or not torch.equal(weight, start[name]), name
