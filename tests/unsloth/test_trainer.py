# SPDX-License-Identifier: Apache-2.0
"""Unsloth's generated GRPOTrainer against TRL's: log-prob pass, loss and gradients on the same rollouts; real runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from transformers.m3po.gating.module import GATING_MODULE

HERE = Path(__file__).parent
TOLERANCE = 1e-4  # of the largest value
FLOOR = 1e-2  # below it, of this


@pytest.fixture(scope="session")
def plain(beside: dict[str, Future[Any]]) -> dict[str, Any]:
    """What TRL's trainer makes of a batch, by kind and case; made in a process without Unsloth and its stand-ins."""
    return beside["trl"].result()


@pytest.fixture(scope="session")
def plain_trl() -> Any:
    """The module `plain_trl.py`, for its arguments of a run."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("plain_trl", HERE / "plain_trl.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def build(trainer_class: Any, plain_trl: Any, fast: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """`build(kind, case, **flags)`: Unsloth's trainer on a LoRA of the tiny model, or on the whole of it."""
    from unsloth import FastLanguageModel

    def make(kind: str, case: str, lora: bool = True, **flags: Any) -> Any:
        net = fast(cases.model(kind, case), full_finetuning=not lora)
        if lora:
            net = FastLanguageModel.get_peft_model(net, use_gradient_checkpointing=False, **cases.LORA)
            cases.lively(net)
        return trainer_class(
            model=net,
            args=plain_trl.arguments(case, str(tmp_path), **flags),
            reward_funcs=cases.tiny_grpo.reward,
            train_dataset=plain_trl.prompts(),
            processing_class=cases.tokenizer(),
        )

    return make


def assert_close(found: torch.Tensor, wanted: torch.Tensor, name: str) -> None:
    assert (found - wanted).abs().max().item() <= TOLERANCE * max(FLOOR, wanted.abs().max().item()), name


def completions_of(packed: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
    """Log-probs (B, W) of rows packed to the left, as (B, C): each begins its prompt's padding earlier."""
    length = batch["completion_ids"].shape[1]
    shift = packed.shape[1] - length - (batch["prompt_mask"] == 0).sum(1)
    return packed.gather(1, shift[:, None] + torch.arange(length))


@pytest.mark.parametrize(("kind", "case"), cases.BY_TURNS)
def test_log_probs_loss_and_gradients_are_trls(
    kind: str, case: str, plain: dict[str, Any], plain_trl: Any, build: Callable[..., Any]
) -> None:
    wanted = plain[f"{kind} {case}"]
    batch = wanted["batch"]
    assert (batch["prompt_mask"] == 0).any()
    found = plain_trl.scored(build(kind, case, beta=0.0), batch)
    mask = batch["completion_mask"].bool()
    assert_close(completions_of(found["logps"], batch)[mask], wanted["logps"][mask], "log-probs")
    assert_close(found["loss"], wanted["loss"], "loss")
    assert found["gradients"].keys() == wanted["gradients"].keys()
    gates = [value for name, value in wanted["gradients"].items() if GATING_MODULE in name]
    assert bool(gates) == ("gating_type" in cases.CASES[case])
    assert all(value.abs().max() > 1e-4 for value in gates)
    for name, value in wanted["gradients"].items():
        assert_close(found["gradients"][name], value, name)
    assert found["rollout_logp_diff_max"] < TOLERANCE


@pytest.mark.parametrize("case", ["none", "h3po-aslr"])
def test_a_run_on_the_fast_path_trains(case: str, build: Callable[..., Any], tmp_path: Path) -> None:
    # Two passes over each rollout, so that old log-probs are computed; a reference by beta.
    run = build("llama", case, beta=0.1, num_iterations=2, max_steps=2, learning_rate=1e-3)
    start = {name: value.detach().clone() for name, value in run.model.named_parameters() if value.requires_grad}
    run.train()
    assert max(cases.tiny_grpo.logged(run, "m3po/rollout_logp_diff_max")) < TOLERANCE
    moved = {
        name for name, value in run.model.named_parameters() if name in start and not torch.equal(value, start[name])
    }
    own = [name for name in start if any(part in name for part in cases.own_names(run.model.get_base_model()))]
    assert bool(own) == (case != "none") and set(own) <= moved
    run.save_model(str(tmp_path / "final"))
    assert json.loads((tmp_path / "final" / "m3po.json").read_text())["mode"] == cases.CASES[case]["mode"]


def test_full_fine_tuning_runs_through_unsloths_stock_forwards(build: Callable[..., Any]) -> None:
    run = build("qwen2", "h3po-aslr", lora=False, beta=0.0, max_steps=2, learning_rate=1e-3)
    run.train()
    found = cases.tiny_grpo.logged(run, "m3po/rollout_logp_diff_max")
    assert len(found) == 2 and max(found) < TOLERANCE


def test_a_mini_batch_that_splits_the_groups_of_a_learnable_gate_is_refused(
    plain: dict[str, Any], plain_trl: Any, build: Callable[..., Any]
) -> None:
    run = build("llama", "m3po-luong")
    run.args.unsloth_grpo_mini_batch = 6
    with pytest.raises(ValueError, match="a mini-batch of 1 rows splits one; set unsloth_grpo_mini_batch=1"):
        plain_trl.scored(run, plain["llama m3po-luong"]["batch"])


def test_mini_batches_give_the_same_gradients(plain: dict[str, Any], plain_trl: Any, build: Callable[..., Any]) -> None:
    run, wanted = build("qwen3", "h3po-aslr", beta=0.0), plain["qwen3 h3po-aslr"]
    run.args.unsloth_grpo_mini_batch = 3
    found = plain_trl.scored(run, wanted["batch"])
    for name, value in wanted["gradients"].items():
        assert_close(found["gradients"][name], value, name)


def test_a_padding_token_inside_a_completion_moves_the_bags_with_the_tokens() -> None:
    # Upstream drops it (in mode none too); what comes behind it stands one column earlier, and so do its bags.
    from types import SimpleNamespace

    from transformers.m3po.thinking.record import RolloutRecord
    from unsloth.models.m3po import ScoredRows
    from unsloth_zoo.rl_replacements import left_pack_padding

    ids = torch.tensor([[0, 0, 5, 6, 0, 7, 8, 0], [3, 4, 5, 6, 7, 8, 9, 2]])
    trainer = SimpleNamespace(processing_class=SimpleNamespace(pad_token_id=0))
    rows = ScoredRows(trainer, ids, 5, RolloutRecord(torch.zeros(2, 5)))
    packed = left_pack_padding(ids, 0)
    assert torch.equal(packed.gather(1, rows._columns), ids[:, 3:])


def test_without_the_hook_in_the_log_prob_pass_a_mode_is_refused(
    trainer_class: Any, build: Callable[..., Any], monkeypatch: Any
) -> None:
    def unpatched(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("no pass is made")

    monkeypatch.setattr(trainer_class.__mro__[1], "_get_per_token_logps_and_entropies", unpatched)
    refusal = "has its own _get_per_token_logps_and_entropies, .*this Unsloth lacks the patches"
    with pytest.raises(ValueError, match=refusal):
        build("llama", "m3po")
    build("llama", "none")


def test_without_the_hook_in_the_zoos_loss_a_mode_is_refused(
    trainer_class: Any, build: Callable[..., Any], monkeypatch: Any
) -> None:
    module = sys.modules[trainer_class.__mro__[1].__module__]
    monkeypatch.setattr(module, "grpo_accumulated_loss", lambda *args, **kwargs: None)
    with pytest.raises(ValueError, match="has its own grpo_accumulated_loss"):
        build("llama", "m3po")
