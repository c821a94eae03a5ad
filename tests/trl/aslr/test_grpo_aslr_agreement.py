# SPDX-License-Identifier: Apache-2.0
"""With ASLR on, rollout and policy pass agree, and every pass gets the seeds of its own rows.

The modules begin far from their start (`with_aslr`), so that what they add moves the log-probs by much more than the
bound; two of the cases begin with fresh modules, which then train.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers.m3po import hooks
from transformers.m3po.aslr import modules as aslr
from transformers.m3po.aslr.modules import ASLR_MODULES, attach_aslr

BOUND = 1e-4  # the largest difference of log-probs, in fp32, that rounding explains
MARKER = {"answer_start": "#", "thinking_residual_r_min": 0.3, "thinking_residual_r_max": 0.6}
ON = {**MARKER, "aslr_enabled": True}
MODES = ("none", "m3po", "hrpo", "h3po")
ADAPTER = {"r": 4, "target_modules": "all-linear"}
SMALL = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}

# name: flags, and the steps whose policy pass has the weights of the rollout
CASES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "one batch": ({"max_steps": 3}, [1, 2, 3]),
    "gradient accumulation, another temperature": ({**SMALL, "temperature": 0.7}, [1, 2]),
    "two iterations over several steps, padding to a multiple": (
        {
            "per_device_train_batch_size": 4,
            "num_iterations": 2,
            "steps_per_generation": 2,
            "max_steps": 5,
            "pad_to_multiple_of": 16,
        },
        [1, 5],
    ),
    "gradient checkpointing": ({"gradient_checkpointing": True}, [1, 2]),
    "reentrant gradient checkpointing, other hyperparameters": (
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
            "aslr_max_iterations": 3,
            "aslr_threshold": 0.6,
            "aslr_gumbel_temp": 2.0,
            "aslr_cross_path_lambda": 0.7,
            "aslr_cross_path_temp": 2.0,
        },
        [1, 2],
    ),
}
BATTERY = [("one batch", mode, "llama") for mode in MODES]
BATTERY += [(case, mode, "llama") for case in [*CASES][1:] for mode in ("none", "h3po")]
BATTERY += [("one batch", "none", "qwen2")]
BATTERY += [(case, mode, "qwen2") for case, mode in zip([*CASES][2:], ("h3po", "m3po", "hrpo"), strict=True)]


def check_agreement(tiny: Any, run: Any, expected_steps: list[int]) -> None:
    """The loop ran, rows stopped at different lengths, and the largest difference stays below the bound."""
    logged_at = [entry["step"] for entry in run.state.log_history if "m3po/rollout_logp_diff_max" in entry]
    assert logged_at == expected_steps
    assert max(tiny.logged(run, "m3po/rollout_logp_diff_max")) < BOUND
    assert min(tiny.logged(run, "m3po/latent_diversity_after")) > 0.005
    assert (max(tiny.logged(run, "m3po/attention_max"), default=0) > 0) == (run.args.mode in ("m3po", "h3po"))
    assert 0 < tiny.logged(run, "completions/clipped_ratio")[0] < 1
    assert tiny.logged(run, "completions/min_length")[0] < tiny.logged(run, "completions/max_length")[0]


@pytest.mark.parametrize(("case", "mode", "kind"), BATTERY)
def test_rollout_and_policy_pass_agree_for_equal_weights(tiny: Any, tmp_path: Path, case: str, mode: str, kind: str):
    flags, expected_steps = CASES[case]
    run = tiny.trainer(tmp_path, kind, flags={**ON, "mode": mode, **flags}, model=tiny.with_aslr(kind))
    run.train()
    check_agreement(tiny, run, expected_steps)


@pytest.mark.parametrize(("mode", "checkpointing"), [("none", True), ("h3po", False)])
def test_they_agree_under_lora_with_the_adapter_off_in_the_reference_pass(
    tiny: Any, tmp_path: Path, mode: str, checkpointing: bool
):
    """The start model has trained modules: with the adapter off they act, and not fresh ones."""
    flags = {**ON, **SMALL, "mode": mode, "beta": 0.1, "gradient_checkpointing": checkpointing}
    run = tiny.trainer(tmp_path, flags=flags, model=tiny.with_aslr(), peft_config=LoraConfig(**ADAPTER))
    run.train()
    check_agreement(tiny, run, [1, 2])
    first, second = tiny.logged(run, "kl")
    assert first < 1e-8 < 1e-6 < second


@pytest.mark.parametrize(("kind", "lora"), [("llama", True), ("qwen2", False)], ids=["llama lora", "qwen2 full"])
def test_fresh_modules_that_train_with_a_large_learning_rate_stay_in_agreement(
    tiny: Any, tmp_path: Path, kind: str, lora: bool
):
    given = {"peft_config": LoraConfig(**ADAPTER)} if lora else {}
    run = tiny.trainer(tmp_path, kind, flags={**ON, "max_steps": 4, "learning_rate": 5e-2}, **given)
    run.train()
    check_agreement(tiny, run, [1, 2, 3, 4])
    seeds = torch.arange(8)
    ids = torch.randint(2, 24, (8, 10))
    with torch.no_grad():
        one, other = (
            run.model(ids, aslr_row_seeds=seeds + off, is_m3po_inference=False).logits.log_softmax(-1) for off in (0, 9)
        )
    assert (one - other).abs().max() > 100 * BOUND  # what the modules add is not nothing by then


@pytest.mark.parametrize(("mode", "trained"), [("none", True), ("m3po", False), ("h3po", True)])
def test_they_agree_with_a_reference_model_whose_kl_starts_at_zero(tiny: Any, tmp_path: Path, mode: str, trained: bool):
    """TRL loads it from the folder that the policy came from, with modules of ASLR in it or without."""
    start = tiny.with_aslr() if trained else tiny.model()
    start.save_pretrained(tmp_path / "start")
    model = type(start).from_pretrained(tmp_path / "start")
    flags = {**ON, "mode": mode, "beta": 0.1, "aslr_gumbel_temp": 2.0}
    run = tiny.trainer(tmp_path, flags=flags, model=model)
    kept = {name: value.clone() for name, value in run.ref_model.state_dict().items()}
    assert run.ref_model.config.aslr_gumbel_temp == 2.0
    run.train()
    check_agreement(tiny, run, [1, 2])
    first, second = tiny.logged(run, "kl")
    assert first < 1e-8 < 1e-6 < second
    assert all(torch.equal(value, kept[name]) for name, value in run.ref_model.state_dict().items())
    assert sum("m3po_" in name for name in kept) == 9


def test_the_reference_gets_modules_that_only_the_policy_in_memory_has(tiny: Any, tmp_path: Path):
    tiny.model().save_pretrained(tmp_path / "start")
    model = type(tiny.model()).from_pretrained(tmp_path / "start")
    attach_aslr(model, aslr_num_paths=3)
    for name in ASLR_MODULES:
        theirs = getattr(tiny.with_aslr(aslr_num_paths=3).model, name).state_dict()
        getattr(model.model, name).load_state_dict(theirs)
    run = tiny.trainer(tmp_path, flags={**MARKER, "beta": 0.1}, model=model)  # aslr_enabled is the model's
    run.train()
    check_agreement(tiny, run, [1, 2])
    first, second = tiny.logged(run, "kl")
    assert first < 1e-8 < 1e-6 < second and run.ref_model.config.aslr_num_paths == 3


def test_they_agree_from_a_saved_adapter_which_is_then_the_reference(tiny: Any, tmp_path: Path):
    flags = {**ON, "mode": "m3po", "beta": 0.1}
    first = tiny.trainer(tmp_path, flags={**flags, "max_steps": 1}, peft_config=LoraConfig(**ADAPTER))
    first.train()
    first.save_model(str(tmp_path / "adapter"))
    base = tiny.with_aslr()  # other modules: with the adapter off, the policy is another one
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    run = tiny.trainer(tmp_path, flags=flags, model=loaded)
    run.train()
    check_agreement(tiny, run, [1, 2])
    before, after = tiny.logged(run, "kl")
    assert before < 1e-8 < 1e-6 < after


@pytest.mark.parametrize(
    ("mode", "more", "expected_steps"),
    [("none", {}, [1, 2]), ("m3po", {"num_iterations": 2, "max_steps": 4}, [1, 3])],
)
def test_they_agree_when_evaluations_lie_between_the_steps(
    tiny: Any, tmp_path: Path, mode: str, more: dict[str, Any], expected_steps: list[int]
):
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4, "num_generations_eval": 2}
    run = tiny.trainer(
        tmp_path,
        flags={**ON, "mode": mode, **more, **evaluation},
        model=tiny.with_aslr(),
        eval_dataset=tiny.prompts().select(range(3)),  # 6 rollouts: the second batch is short
    )
    run.train()
    check_agreement(tiny, run, expected_steps)
    evaluated = tiny.logged(run, "eval_m3po/rollout_logp_diff_max")
    assert len(evaluated) == run.state.global_step and 0 < max(evaluated) < BOUND
    assert len(tiny.logged(run, "eval_m3po/router_weight_mean")) == run.state.global_step


# Seeds


def take_seeds(run: Any, how: str) -> None:
    """Gives the policy pass no seeds, so that it draws its own, or those of another row."""
    loss = run._compute_loss

    def other_seeds(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        inputs = dict(inputs)
        seeds = inputs.pop("rollout_row_seeds")
        return loss(model, inputs if how == "withheld" else inputs | {"rollout_row_seeds": seeds.roll(1)})

    run._compute_loss = other_seeds


@pytest.mark.parametrize(("mode", "how"), [("none", "withheld"), ("h3po", "withheld"), ("m3po", "of another row")])
def test_the_difference_jumps_when_the_policy_pass_lacks_the_seeds_of_its_rows(
    tiny: Any, tmp_path: Path, mode: str, how: str
):
    run = tiny.trainer(tmp_path, flags={**ON, "mode": mode}, model=tiny.with_aslr())
    take_seeds(run, how)
    run.train()
    differences = tiny.logged(run, "m3po/rollout_logp_diff_max")
    assert len(differences) == 2 and min(differences) > 100 * BOUND


def spy(run: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[tuple[int, ...], int], dict[str, list[Any]]]:
    """What a run rolls out, text: seed, and per scoring pass (policy, old, reference) its rows, (text, seed, inputs).

    A text is the tokens of a row that the rollout wrote, without padding.
    """
    rolled: dict[tuple[int, ...], int] = {}
    rows: dict[str, list[Any]] = defaultdict(list)
    generate, score, refine = run.model.generate, run._get_per_token_logps_and_entropies, aslr.refine_states
    running: list[tuple[str, list[tuple[int, ...]]]] = []

    def texts(ids: torch.Tensor, mask: torch.Tensor) -> list[tuple[int, ...]]:
        return [tuple(row[kept.bool()].tolist()) for row, kept in zip(ids, mask, strict=True)]

    def watched_generate(*args: Any, **kwargs: Any) -> Any:
        sequences = generate(*args, **kwargs)
        completions = sequences[:, kwargs["input_ids"].size(1) :]
        ended = (completions == 1).cumsum(1) - (completions == 1).long() > 0  # behind the end token
        mask = torch.cat([kwargs["attention_mask"], (~ended).long()], 1)
        rolled.update(zip(texts(sequences, mask), kwargs["m3po"].row_seeds.tolist(), strict=True))
        return sequences

    def watched_score(model: Any, ids: torch.Tensor, mask: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = "reference" if model is run.ref_model else "policy" if torch.is_grad_enabled() else "old"
        running.append((name, texts(ids, mask)))
        try:
            return score(model, ids, mask, *args, **kwargs)
        finally:
            running.pop()

    def watched_refine(model: Any, states: torch.Tensor, positions: torch.Tensor, inputs: dict[str, Any]) -> Any:
        if running and inputs.get("aslr_row_seeds") is not None:
            name, given = running[-1]
            done = len(rows[name]) % len(given)  # upstream scores a batch in parts
            part = given[done : done + len(states)]
            seeds = inputs["aslr_row_seeds"].tolist()
            rows[name] += [(text, seed, inputs["is_m3po_inference"]) for text, seed in zip(part, seeds, strict=True)]
        return refine(model, states, positions, inputs)

    monkeypatch.setattr(hooks, "refine_states", watched_refine)
    run.model.generate = watched_generate
    run._get_per_token_logps_and_entropies = watched_score
    return rolled, rows


@pytest.mark.parametrize(("mode", "kind"), [("none", "llama"), ("m3po", "qwen2"), ("h3po", "llama")])
def test_policy_old_and_reference_pass_get_the_seeds_of_their_own_rows(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, kind: str
):
    tiny.with_aslr(kind).save_pretrained(tmp_path / "start")
    model = type(tiny.model(kind)).from_pretrained(tmp_path / "start")
    run = tiny.trainer(
        tmp_path, kind, flags={**ON, **SMALL, "mode": mode, "beta": 0.1, "num_iterations": 2}, model=model
    )
    rolled, rows = spy(run, monkeypatch)
    run.train()
    assert {name: len(seen) for name, seen in rows.items()} == {"old": 8, "reference": 8, "policy": 16}
    assert len(rolled) == len(set(rolled.values())) == 8
    for name, seen in rows.items():
        assert seen == [(text, rolled[text], False) for text, _, _ in seen], name
    assert [text for text, _, _ in rows["policy"][:8]] != list(rolled)  # upstream has shuffled them


def test_every_rollout_draws_new_seeds_and_the_run_repeats_them(tiny: Any, tmp_path: Path):
    drawn = []
    for _ in range(2):
        run = tiny.trainer(tmp_path, flags={**ON, "max_steps": 3})
        batches = tiny.keep_batches(run)
        run.train()
        drawn.append([seed for batch in batches for seed in batch["rollout_row_seeds"].tolist()])
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 24


def test_old_log_probs_are_the_rollouts(tiny: Any, tmp_path: Path):
    run = tiny.trainer(tmp_path, flags={**ON, "mode": "m3po", "num_iterations": 2}, model=tiny.with_aslr())
    batches = tiny.keep_batches(run)
    run.train()
    (batch,) = batches
    difference = (batch["old_per_token_logps"] - batch["rollout_logps"]) * batch["completion_mask"]
    assert 0 < difference.abs().max() < BOUND


# Refining the last position alone


def test_refining_the_last_position_alone_is_another_policy_in_the_scoring_pass(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A decode step has one position, which is refined; in the policy pass that one is dropped."""
    loop = aslr._inner_loop

    def last_alone(*args: Any) -> torch.Tensor:
        states = args[-1]
        return torch.cat([states[:, :-1], loop(*args)[:, -1:]], 1)

    monkeypatch.setattr(aslr, "_inner_loop", last_alone)
    run = tiny.trainer(tmp_path, flags=ON, model=tiny.with_aslr())
    run.train()
    assert min(tiny.logged(run, "m3po/rollout_logp_diff_max")) > 1000 * BOUND
