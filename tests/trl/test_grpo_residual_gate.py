# SPDX-License-Identifier: Apache-2.0
"""HRPO's residual gate in training: its start, its place beside an adapter, its learning rates, what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import TrainerCallback
from transformers.m3po.aslr.settings import ASLR_HYPERPARAMETERS
from transformers.m3po.thinking.residual_gate import RESIDUAL_GATE_MODULES, attach_residual_gate
from trl.trainer.m3po.modules import prepare_policy

EVEN = {"answer_start": "#", "thinking_residual_r_min": 0.3, "thinking_residual_r_max": 0.6}
ADAPTER = {"r": 2, "target_modules": "all-linear"}
THINKING = ("hrpo", "h3po")


def gate_of(model: Any) -> dict[str, torch.Tensor]:
    """The parameters of the gate that is used, by their names on the base model; copies."""
    return {
        name.split("model.")[-1].replace("modules_to_save.default.", ""): value.detach().clone()
        for name, value in model.named_parameters()
        if any(module in name for module in RESIDUAL_GATE_MODULES) and "original_module" not in name
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return len(one) == 5 and one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# The start of the gate


def test_the_gate_starts_as_the_seed_of_the_run_says_whatever_was_drawn_before(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plain, starts = tiny.model, []
    for drawn, seed in ((1, 5), (2, 5), (1, 6)):

        def model(kind: str = "llama", drawn: int = drawn) -> Any:
            made = plain(kind)  # sets a seed of its own
            torch.manual_seed(drawn)
            return made

        monkeypatch.setattr(tiny, "model", model)
        starts.append(gate_of(tiny.trainer(tmp_path, flags={"mode": "hrpo", "seed": seed}).model))
    first, again, other = starts
    assert same(first, again)
    assert all(not torch.equal(first[name], other[name]) for name in first if "bias" not in name)


def test_the_gate_starts_within_its_bounds_and_with_the_models_own_initialisation(tiny: Any, tmp_path: Path):
    run = tiny.trainer(tmp_path, flags={"mode": "h3po", **EVEN})
    gate = gate_of(run.model)
    decay = torch.exp(-8.0 * torch.nn.functional.softplus(-gate["thinking_residual_Lambda.Lambda"]))
    assert 0.3 <= decay.min() < 0.4 and 0.5 < decay.max() <= 0.6  # 32 even draws
    for side in "ri":
        assert not gate[f"thinking_residual_gate_{side}.bias"].any()
        # 1,024 draws: their deviation is within 10 % of the true one, four standard errors
        weight = gate[f"thinking_residual_gate_{side}.weight"]
        assert weight.std().item() == pytest.approx(run.model.config.initializer_range, rel=0.1)
    config = run.model.config
    assert (config.thinking_residual_r_min, config.thinking_residual_r_max) == (0.3, 0.6)


def test_making_the_gate_draws_nothing_from_the_random_state(tiny: Any):
    model = tiny.model()
    before = torch.get_rng_state()
    attach_residual_gate(model, 0.3, 0.6, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_and_its_control_start_with_the_same_adapter_and_see_the_same_prompts(tiny: Any, tmp_path: Path):
    seen: dict[str, list[str]] = {}
    adapters = []
    for mode in ("none", "hrpo"):

        def reward(prompts: list[str], completions: list[str], mode: str = mode, **_: Any) -> list[float]:
            seen.setdefault(mode, []).extend(prompts)
            return tiny.reward(completions)

        model = tiny.model()
        torch.manual_seed(3)
        given = {"model": model, "peft_config": LoraConfig(**ADAPTER), "reward_funcs": reward}
        run = tiny.trainer(tmp_path, flags={"mode": mode}, **given)
        adapters.append({name: value.clone() for name, value in run.model.named_parameters() if "lora_A" in name})
        run.train()
    assert seen["none"] == seen["hrpo"] and len(set(seen["none"])) == 4
    control, ours = adapters
    assert all(torch.equal(value, ours[name]) for name, value in control.items())


# Beside an adapter


@pytest.mark.parametrize(
    ("excluded", "left"),
    [
        (None, "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
        (["q_proj", "up_proj"], "k_proj v_proj o_proj gate_proj down_proj"),
        (r".*\.(q|k)_proj|.*\.mlp\..*", "v_proj o_proj"),
    ],
    ids=["none", "list", "pattern"],
)
def test_the_gate_is_trained_whole_in_float32_and_carries_no_lora(tiny: Any, tmp_path: Path, excluded: Any, left: str):
    given = LoraConfig(**ADAPTER, exclude_modules=excluded)
    before = given.to_dict()
    model = tiny.model().to(torch.bfloat16)
    run = tiny.trainer(tmp_path, flags={"mode": "hrpo"}, model=model, peft_config=given)
    assert given.to_dict() == before  # the user's object
    gate = {name: value for name, value in run.model.named_parameters() if "thinking_residual" in name}
    used = [name for name, value in gate.items() if value.requires_grad]
    assert len(gate) == 10 and len(used) == 5 and all("modules_to_save.default" in name for name in used)
    assert {value.dtype for value in gate.values()} == {torch.float32}
    wrapped = {name.split(".lora_")[0].split(".")[-1] for name, _ in run.model.named_parameters() if ".lora_" in name}
    assert wrapped == set(left.split())


def test_a_pattern_that_matches_the_gate_lays_no_lora_on_it(tiny: Any, tmp_path: Path):
    given = LoraConfig(r=2, target_modules=r".*(q_proj|thinking_residual_gate_[ri])")
    run = tiny.trainer(tmp_path, flags={"mode": "hrpo"}, peft_config=given)
    wrapped = {name.split(".lora_")[0].split(".")[-1] for name, _ in run.model.named_parameters() if ".lora_" in name}
    assert wrapped == {"q_proj"}


def test_modules_that_the_user_saves_stay_among_the_saved_ones(tiny: Any, tmp_path: Path):
    given = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    run = tiny.trainer(tmp_path, flags={"mode": "h3po"}, peft_config=given)
    assert set(run.model.peft_config["default"].modules_to_save) == {"lm_head", *RESIDUAL_GATE_MODULES}
    assert given.modules_to_save == ["lm_head"]


@pytest.mark.parametrize("embeddings", ["target_modules", "modules_to_save"])
@pytest.mark.parametrize("mode", ["m3po", "hrpo"])
def test_an_adapter_may_reach_the_embeddings(tiny: Any, tmp_path: Path, mode: str, embeddings: str):
    lists = {"target_modules": ["q_proj"], "modules_to_save": []}
    lists[embeddings] = [*lists[embeddings], "embed_tokens"]
    run = tiny.trainer(tmp_path, flags={"mode": mode, **EVEN}, peft_config=LoraConfig(r=2, **lists))
    run.train()
    assert max(tiny.logged(run, "m3po/rollout_logp_diff_max")) < 1e-4


# The reference


def test_the_reference_keeps_the_gate_that_the_policy_started_with(tiny: Any, tmp_path: Path):
    """A gate of the user's own, which the folder that TRL loads the reference from does not have."""
    tiny.model().save_pretrained(tmp_path / "start")
    model = type(tiny.model()).from_pretrained(tmp_path / "start")
    attach_residual_gate(model, 0.3, 0.6, seed=77)
    start = gate_of(model)
    run = tiny.trainer(tmp_path, flags={"mode": "hrpo", "beta": 0.1, **EVEN}, model=model)
    run.train()
    assert same(gate_of(run.ref_model), start)
    assert not any(torch.equal(value, start[name]) for name, value in gate_of(run.model).items())
    first, second = tiny.logged(run, "kl")
    assert first < 1e-8 < 1e-6 < second


# Learning rates


def groups(run: Any) -> list[tuple[float, float, set[str]]]:
    """Learning rate, weight decay and names of the parameters of every group that has any."""
    names = {id(value): name for name, value in run.model.named_parameters()}
    return [
        (group["lr"], group["weight_decay"], {names[id(value)] for value in group["params"]})
        for group in run.optimizer.param_groups
        if group["params"]
    ]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("mode", THINKING)
def test_gate_and_lambda_are_groups_with_their_own_rate_and_the_runs_weight_decay(
    tiny: Any, tmp_path: Path, mode: str, lora: bool
):
    run = tiny.trainer(
        tmp_path,
        flags={"mode": mode, "learning_rate": 3e-5, "weight_decay": 0.1},
        peft_config=LoraConfig(**ADAPTER) if lora else None,
    )
    run.create_optimizer()
    found = groups(run)
    trained = [name for name, value in run.model.named_parameters() if value.requires_grad]
    assert sorted(name for _, _, names in found for name in names) == sorted(trained)  # none twice, none missing
    assert sum(len(group["params"]) for group in run.optimizer.param_groups) == len(trained)
    *rest, (gate_rate, gate_decay, layers), (lambda_rate, lambda_decay, decay) = found
    assert (gate_rate, gate_decay, len(layers)) == (1e-4, 0.1, 4) and all("residual_gate" in name for name in layers)
    assert (lambda_rate, lambda_decay, len(decay)) == (1e-3, 0.1, 1) and all("Lambda" in name for name in decay)
    assert [(rate, weight_decay) for rate, weight_decay, _ in rest] == [(3e-5, 0.1), (3e-5, 0.0)][: 1 if lora else 2]
    assert len(run.optimizer.param_groups) == 4


@pytest.mark.parametrize("mode", ["none", "m3po"])
def test_a_mode_without_a_gate_has_upstreams_groups(tiny: Any, tmp_path: Path, mode: str):
    run = tiny.trainer(tmp_path, flags={"mode": mode})
    run.create_optimizer()
    assert [rate for rate, _, _ in groups(run)] == [1e-2, 1e-2]


class Rates(TrainerCallback):
    """The learning rate of every group at each step, and the gradients of the first."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.seen.append([group["lr"] for group in given["optimizer"].param_groups])
        if state.global_step == 0:
            self.gradients = {name: value.grad.clone() for name, value in given["model"].named_parameters()}


def test_the_first_step_moves_every_parameter_by_the_rate_of_its_group(tiny: Any, tmp_path: Path):
    flags = {"optim": "sgd", "max_grad_norm": 0.0, "max_steps": 1, "learning_rate": 0.1, **EVEN}
    flags |= {"thinking_residual_gate_learning_rate": 0.5, "thinking_residual_lambda_learning_rate": 2.0}
    run = tiny.trainer(tmp_path, flags={"mode": "hrpo", **flags})
    rates = Rates()
    run.add_callback(rates)
    before = {name: value.detach().clone() for name, value in run.model.named_parameters()}
    run.train()
    for name, value in run.model.named_parameters():
        rate = 2.0 if "Lambda" in name else 0.5 if "residual_gate" in name else 0.1
        # One multiplication and one subtraction in float32, of weights below 100.
        torch.testing.assert_close(value, before[name] - rate * rates.gradients[name], rtol=1e-6, atol=1e-6, msg=name)
        if rate != 0.1:  # a rate of another group would be at least 0.4 * 1e-3 off
            assert rates.gradients[name].abs().max() > 1e-3, name


def test_the_scheduler_scales_every_group(tiny: Any, tmp_path: Path):
    run = tiny.trainer(tmp_path, flags={"mode": "h3po", "max_steps": 3, "lr_scheduler_type": "linear"})
    rates = Rates()
    run.add_callback(rates)
    run.train()
    start = torch.tensor([1e-2, 1e-2, 1e-4, 1e-3])
    for share, seen in zip((1.0, 2 / 3, 1 / 3), rates.seen, strict=True):
        torch.testing.assert_close(torch.tensor(seen), share * start)


def test_an_optimizer_of_the_user_keeps_its_groups(tiny: Any, tmp_path: Path):
    model = tiny.model()
    attach_residual_gate(model, 0.3, 0.6, seed=1)
    theirs = torch.optim.SGD(model.parameters(), lr=0.03)
    run = tiny.trainer(tmp_path, flags={"mode": "hrpo"}, model=model, optimizers=(theirs, None))
    run.train()
    assert run.create_optimizer().optimizer is theirs  # in accelerate's wrapper
    (group,) = theirs.param_groups
    assert group["lr"] == 0.03 and len(group["params"]) == len(list(model.parameters()))


def test_training_again_does_not_group_again(tiny: Any, tmp_path: Path):
    run = tiny.trainer(tmp_path, flags={"mode": "hrpo", "max_steps": 1})
    run.train()
    before = groups(run)
    run.train()
    assert groups(run) == before and len(before) == 4


# What is refused


def test_a_plain_adapter_is_refused(tiny: Any, tmp_path: Path):
    plain = tiny.trainer(tmp_path, flags={"mode": "none"}, peft_config=LoraConfig(**ADAPTER)).model
    for mode in THINKING:
        with pytest.raises(ValueError, match=f"^the adapter was trained without a residual gate, which mode='{mode}'"):
            tiny.trainer(tmp_path, flags={"mode": mode}, model=plain)


@pytest.mark.parametrize("mode", ["none", "m3po"])
def test_a_model_with_a_gate_is_refused_by_a_mode_without(tiny: Any, tmp_path: Path, mode: str):
    model = tiny.model()
    attach_residual_gate(model, 0.3, 0.6, seed=1)
    said = f"^the model has a residual gate .*mode='{mode}' does not train it; set mode='hrpo' or 'h3po'"
    with pytest.raises(ValueError, match=said):
        tiny.trainer(tmp_path, flags={"mode": mode}, model=model)
    adapted = tiny.trainer(tmp_path, flags={"mode": "hrpo"}, model=model, peft_config=LoraConfig(**ADAPTER)).model
    with pytest.raises(ValueError, match=said):
        tiny.trainer(tmp_path, flags={"mode": mode}, model=adapted)


@pytest.mark.parametrize("mode", ["none", "m3po", "hrpo"])
def test_an_adapter_whose_gate_the_base_model_lacks_is_refused(tiny: Any, tmp_path: Path, mode: str):
    """PEFT loads such an adapter without a word, and without its gate."""
    run = tiny.trainer(tmp_path, flags={"mode": "hrpo"}, peft_config=LoraConfig(**ADAPTER))
    run.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(tiny.model(), tmp_path / "adapter", is_trainable=True)
    with pytest.raises(ValueError, match="gate") as caught:
        tiny.trainer(tmp_path, flags={"mode": mode}, model=loaded)
    assert "was trained without" not in str(caught.value)


def test_an_optimizer_in_the_deepspeed_configuration_is_refused(tiny: Any):
    plugin = SimpleNamespace(deepspeed_config={"optimizer": {"type": "AdamW"}})
    args = SimpleNamespace(
        mode="hrpo",
        gating_type="baseline",
        deepspeed_plugin=plugin,
        aslr_enabled=None,
        **dict.fromkeys(ASLR_HYPERPARAMETERS),
    )
    with pytest.raises(ValueError, match="^the DeepSpeed configuration has an optimizer.*leave it out and set optim"):
        prepare_policy(tiny.model(), args, None)
