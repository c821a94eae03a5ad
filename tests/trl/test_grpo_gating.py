# SPDX-License-Identifier: Apache-2.0
"""Learnable gating functions in training: gradient, whole groups, learning rate, warm-up, saving, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, TrainerCallback
from transformers.m3po.gating import list_gating_functions
from transformers.m3po.gating.factory import gating_class
from transformers.m3po.gating.module import attach_gating
from trl.trainer.m3po.checks import check_trainer
from trl.trainer.m3po.gating import as_groups, as_rows
from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict

BOUND = 1e-4
LEARNABLE = [name for name in list_gating_functions() if gating_class(name).learnable]
SIZE = {"luong": "rank", "bahdanau": "attention_dim"}
FLAGS = {"answer_start": "#", "cross_path_lambda": 0.5, "cross_path_temp": 0.1}
ADAPTER = {"r": 2, "target_modules": "all-linear"}
KINDS = [(gate, projects) for gate in LEARNABLE for projects in (False, True)]


def flags_of(gate: str, projects: bool = False, **more: Any) -> dict[str, Any]:
    options = {SIZE[gate]: 8, "project_embeddings": projects}
    return {**FLAGS, "mode": "m3po", "gating_type": gate, "gating_config": options, **more}


def gate_of(model: Any) -> dict[str, torch.Tensor]:
    """The parameters of the gate that is used, by their names on the base model; copies."""
    return {
        name.split("model.")[-1].replace("modules_to_save.default.", ""): value.detach().clone()
        for name, value in model.named_parameters()
        if "m3po_gating" in name and "original_module" not in name
    }


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, float]:
    assert before and before.keys() == after.keys()
    return {name: ((after[name] - value).norm() / value.norm()).item() for name, value in before.items()}


# The default training: the policy that was rolled out


@pytest.mark.parametrize(("gate", "projects", "mode"), [(*KINDS[k], ("m3po", "h3po")[k % 2]) for k in (0, 1, 3, 2)])
def test_all_parameters_learn_and_the_passes_still_agree(
    tiny: Any, tmp_path: Path, gate: str, projects: bool, mode: str
):
    flags = flags_of(gate, projects, mode=mode, max_steps=3, gating_learning_rate=0.05)
    run = tiny.trainer(tmp_path, flags=flags | {"thinking_residual_r_min": 0.3, "thinking_residual_r_max": 0.6})
    before = gate_of(run.model)
    run.train()
    assert min(moved(before, gate_of(run.model)).values()) > 1e-3
    assert all(value.dtype == torch.float32 for value in gate_of(run.model).values())
    differences = tiny.logged(run, "m3po/rollout_logp_diff_max")
    assert len(differences) == 3 and max(differences) < BOUND  # after updates of the gate too
    distances, norms = tiny.logged(run, "m3po/gating_distance"), tiny.logged(run, "m3po/gating_grad_norm")
    assert distances[0] == 0 < distances[1] < distances[2] and norms[0] > 0


CASES = {
    "gradient accumulation, three entries": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "thought_top_k": 3,
    },
    "two iterations over several steps, the whole vocabulary": {
        "per_device_train_batch_size": 4,
        "steps_per_generation": 2,
        "num_iterations": 2,
        "max_steps": 4,
        "thought_top_k": 0,
    },
    "two peers of three, gradient checkpointing": {
        "cross_path_top_k": 2,
        "answer_start": "####",
        "gradient_checkpointing": True,
    },
    "matched temperature, padding to a multiple": {"cross_path_temp": "match", "pad_to_multiple_of": 16},
}


@pytest.mark.parametrize("mode", ["m3po", "h3po"])
@pytest.mark.parametrize("case", CASES)
def test_the_passes_agree_however_the_rollout_is_cut(tiny: Any, tmp_path: Path, case: str, mode: str):
    gate = LEARNABLE[list(CASES).index(case) % len(LEARNABLE)]
    run = tiny.trainer(tmp_path, flags=flags_of(gate, mode=mode, **CASES[case]))
    run.train()
    assert max(tiny.logged(run, "m3po/rollout_logp_diff_max")) < BOUND
    assert max(tiny.logged(run, "m3po/gating_distance")) > 0
    assert max(tiny.logged(run, "m3po/gating_grad_norm")) < 1e6
    if "cross_path_top_k" in CASES[case]:
        assert 0 < tiny.logged(run, "m3po/attention_cut")[0] < 0.5
    if "cross_path_temp" in CASES[case]:
        assert tiny.logged(run, "m3po/matched_temperature")[0] > 0


def test_the_policy_pass_works_the_weights_out_again(tiny: Any, tmp_path: Path):
    """With a gate that was changed after the rollout, the pass differs from it: the stored weights are not read."""
    run = tiny.trainer(tmp_path, flags=flags_of("luong", max_steps=1))
    make = run._generate_and_score_completions

    def make_and_change(inputs: Any) -> Any:
        batch = make(inputs)
        with torch.no_grad():
            run.model.model.m3po_gating.V.mul_(-1.0)
        return batch

    run._generate_and_score_completions = make_and_change
    run.train()
    assert tiny.logged(run, "m3po/rollout_logp_diff_max")[0] > 100 * BOUND


def test_the_gradient_of_the_gate_is_that_of_the_loss(tiny: Any, tmp_path: Path):
    """Against finite differences of the loss of one micro-batch, in the parameter's own direction of ascent."""
    run = tiny.trainer(tmp_path, flags=flags_of("bahdanau", max_steps=1, num_iterations=1, max_grad_norm=0.0))
    found: dict[str, Any] = {}
    plain = run._compute_loss

    def compute_loss(model: Any, inputs: Any) -> torch.Tensor:
        loss = plain(model, inputs)
        if not found:
            weight = run.model.model.m3po_gating.W2
            found["slope"] = torch.autograd.grad(loss, weight, retain_graph=True)[0]
            # On policy the loss does not depend on the old log-probs' value, so they are pinned to the present ones.
            with torch.no_grad():
                kwargs = run.m3po.policy_inputs(inputs)
            assert kwargs.gating is None  # without gradient the stored weights are read
            step = found["slope"] / found["slope"].norm()
            old = per_token(run, inputs)
            sides = []
            for sign in (1, -1):
                with torch.no_grad():
                    weight.add_(sign * 1e-3 * step)
                sides.append(objective(run, inputs, old).item())
                with torch.no_grad():
                    weight.sub_(sign * 1e-3 * step)
            found["difference"] = (sides[0] - sides[1]) / 2e-3
        return loss

    run._compute_loss = compute_loss
    run.train()
    assert found["difference"] == pytest.approx(found["slope"].norm().item(), rel=0.02)


def per_token(run: Any, inputs: dict[str, Any]) -> torch.Tensor:
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    length = inputs["completion_ids"].shape[1]
    given = run.m3po.policy_inputs(inputs)
    return run._get_per_token_logps_and_entropies(run.model, ids, mask, length, m3po_inputs=given)[0].detach()


def objective(run: Any, inputs: dict[str, Any], old: torch.Tensor) -> torch.Tensor:
    """TRL's default loss, DAPO's: mean over the tokens of the generation batch."""
    ratio = (per_token(run, inputs) - old).exp()
    mask = inputs["completion_mask"]
    advantages = inputs["advantages"].unsqueeze(1) if inputs["advantages"].dim() == 1 else inputs["advantages"]
    return -(ratio * advantages * mask).sum() / inputs["num_items_in_batch"]


# Blended output distributions


@pytest.mark.parametrize(("gate", "projects"), [KINDS[0], KINDS[3]])
def test_blended_logits_train_the_gate_too_and_report_that_they_are_another_policy(
    tiny: Any, tmp_path: Path, gate: str, projects: bool
):
    more = {"gating_training": "logits", "max_steps": 3, "gating_learning_rate": 0.05}
    run = tiny.trainer(tmp_path, flags=flags_of(gate, projects, **more))
    before = gate_of(run.model)
    run.train()
    assert min(moved(before, gate_of(run.model)).values()) > 1e-3
    assert min(tiny.logged(run, "m3po/rollout_logp_diff_max")) > 100 * BOUND
    assert all(entropy > 0 for entropy in tiny.logged(run, "entropy"))


def test_at_lambda_zero_blended_logits_are_the_control(tiny: Any, tmp_path: Path):
    """Same tokens and, but for rounding, same losses as mode none: nothing is blended, and no gate is trained."""
    runs = []
    for flags in ({"mode": "none"}, flags_of("luong", gating_training="logits", cross_path_lambda=0.0)):
        runs.append(tiny.record(lambda flags=flags, **given: tiny.trainer(tmp_path, flags=flags, **given)))
    assert runs[0]["tokens"] == runs[1]["tokens"]
    assert runs[0]["losses"] == pytest.approx(runs[1]["losses"], abs=1e-5)


def test_blended_logits_are_scored_against_a_reference_and_old_policy_of_the_same_kind(tiny: Any, tmp_path: Path):
    """The KL to the reference starts at 0 and the ratio to the old policy at 1: all passes blend."""
    net = tiny.model()
    net.save_pretrained(tmp_path / "start")
    flags = flags_of("luong", gating_training="logits", beta=0.1, max_steps=4)
    more = {"per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 1}
    run = tiny.trainer(tmp_path, flags=flags | more, model=type(net).from_pretrained(tmp_path / "start"))
    run.train()
    kl = tiny.logged(run, "kl")
    assert kl[0] < 1e-8 < 1e-6 < kl[-1]
    assert tiny.logged(run, "clip_ratio/region_mean")[0] == 0


# Whole groups in a micro-batch


def test_shuffling_moves_whole_groups_and_everything_that_belongs_to_a_row():
    rows = torch.arange(12)
    batch = {
        "ids": rows * 10,
        "more": rows.view(12, 1, 1),
        "texts": [f"{row}" for row in rows],
        "step": torch.tensor(3),
    }
    torch.manual_seed(1)
    mixed = as_rows(shuffle_sequence_dict(as_groups({**batch, "none": None}, 4)))
    order = mixed["ids"] // 10
    assert order.tolist() != rows.tolist() and sorted(order.tolist()) == rows.tolist()
    assert (order.view(3, 4) == order.view(3, 4)[:, :1] + torch.arange(4)).all()
    assert (mixed["more"].flatten() == order).all() and mixed["texts"] == [f"{row}" for row in order]
    assert mixed["step"] == 3 and mixed["none"] is None
    parts = split_tensor_dict(mixed, 3)
    assert all((part["ids"] // 40).unique().numel() == 1 for part in parts)


def test_other_gates_shuffle_as_upstream_does(tiny: Any, tmp_path: Path):
    batch = {"ids": torch.arange(8)}
    run = tiny.trainer(tmp_path, flags=FLAGS | {"mode": "m3po", "gating_type": "raw_dot"})
    torch.manual_seed(2)
    ours = run.m3po.as_rows(shuffle_sequence_dict(run.m3po.as_groups(batch)))["ids"]
    torch.manual_seed(2)
    assert torch.equal(ours, shuffle_sequence_dict(batch)["ids"])


# Learning rate, warm-up, λ = 0


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_the_gate_has_its_own_rate_and_no_weight_decay(tiny: Any, tmp_path: Path, adapter: bool):
    given = {"peft_config": LoraConfig(**ADAPTER)} if adapter else {}
    flags = flags_of("bahdanau", gating_learning_rate=0.03, weight_decay=0.1, max_steps=1)
    run = tiny.trainer(tmp_path, flags=flags, **given)
    run.train()
    groups = run.optimizer.param_groups
    own = [group for group in groups if group["lr"] == 0.03]
    assert len(own) == 1 and own[0]["weight_decay"] == 0.0 and len(own[0]["params"]) == 4
    everything = [id(weight) for group in groups for weight in group["params"]]
    trained = [value for value in run.model.parameters() if value.requires_grad]
    assert sorted(everything) == sorted(map(id, trained))
    assert {group["weight_decay"] for group in groups if group is not own[0] and group["params"]} == {
        0.0,
        0.1,
    } or adapter


def test_in_the_warm_up_the_gate_learns_alone(tiny: Any, tmp_path: Path):
    run = tiny.trainer(tmp_path, flags=flags_of("luong", gating_warmup_steps=2, max_steps=3, weight_decay=0.1))
    seen: list[tuple[dict[str, torch.Tensor], torch.Tensor]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
            seen.append((gate_of(model), model.lm_head.weight.detach().clone()))

    start = gate_of(run.model), run.model.lm_head.weight.detach().clone()
    run.add_callback(Watch())
    run.train()
    states = [start, *seen]
    assert [torch.equal(a[1], b[1]) for a, b in zip(states, states[1:], strict=False)] == [True, True, False]
    assert all(min(moved(a[0], b[0]).values()) > 0 for a, b in zip(states, states[1:], strict=False))


@pytest.mark.parametrize("mode", ["m3po", "h3po"])
def test_at_lambda_zero_the_gate_is_no_part_of_the_training(tiny: Any, tmp_path: Path, mode: str):
    """The same tokens, losses and weights as with the baseline, bit for bit, and a gate that stays."""
    runs = []
    for flags in (flags_of("luong", mode=mode), {**FLAGS, "mode": mode}):
        flags = flags | {"cross_path_lambda": 0.0}
        runs.append(tiny.record(lambda flags=flags, **given: tiny.trainer(tmp_path, flags=flags, **given)))
    ours, plain = runs
    assert ours["tokens"] == plain["tokens"] and ours["losses"] == plain["losses"]
    assert all(torch.equal(value, ours["weights"][name]) for name, value in plain["weights"].items())
    assert not any("gating" in key for entry in ours["log"] for key in entry)


# What is saved


@pytest.mark.parametrize(("adapter", "projects"), [(False, True), (True, False), (True, True)])
def test_a_saved_gate_comes_back_whole_and_trains_on(tiny: Any, tmp_path: Path, adapter: bool, projects: bool):
    given = {"peft_config": LoraConfig(**ADAPTER)} if adapter else {}
    flags = flags_of("luong", projects, gating_learning_rate=0.05)
    run = tiny.trainer(tmp_path, flags=flags, **given)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    trained = gate_of(run.model)
    stored = [name for file in (tmp_path / "saved").glob("*.safetensors") for name in load_file(file)]
    expected = {"U", "V", "token_scale", "whitening"} if projects else {"U", "V"}
    assert {name.rsplit(".", 1)[1] for name in stored if "m3po_gating" in name} == expected
    if adapter:
        base = tiny.model()
        attach_gating(base, "luong", flags["gating_config"], seed=99)
        loaded = PeftModel.from_pretrained(base, tmp_path / "saved", is_trainable=True)
    else:
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
        assert loaded.config.m3po_gating_config == {"rank": 8, "project_embeddings": projects}
    again = gate_of(loaded)
    assert trained.keys() == again.keys() and all(torch.equal(value, again[name]) for name, value in trained.items())
    if projects:  # frozen, and part of what the gate reads
        buffers = [dict(net.named_buffers()) for net in (run.model, loaded)]
        scales = [
            next(value for name, value in named.items() if name.endswith("token_scale") and "original" not in name)
            for named in buffers
        ]
        assert torch.equal(*scales) and scales[0].std() > 0
    more = tiny.trainer(tmp_path, flags=flags, model=loaded)
    assert all(torch.equal(value, gate_of(more.model)[name]) for name, value in trained.items())
    more.train()
    assert max(tiny.logged(more, "m3po/rollout_logp_diff_max")) < BOUND
    assert tiny.logged(more, "m3po/gating_distance")[0] == 0


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_a_resumed_run_ends_where_one_that_was_not_stopped_does(tiny: Any, tmp_path: Path, adapter: bool):
    flags = flags_of("bahdanau", max_steps=4, save_strategy="steps", save_steps=2, gating_warmup_steps=1)

    def build() -> Any:
        torch.manual_seed(3)
        given = {"peft_config": LoraConfig(**ADAPTER)} if adapter else {}
        return tiny.trainer(tmp_path / "run", flags=flags, **given)

    whole = build()
    whole.train()
    resumed = build()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    one, other = gate_of(whole.model), gate_of(resumed.model)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert tiny.logged(whole, "m3po/gating_distance")[2:] == tiny.logged(resumed, "m3po/gating_distance")[2:]


# What cannot work


def with_gate(tiny: Any) -> Any:
    net = tiny.model()
    attach_gating(net, "luong", {"rank": 8})
    return net


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            {"mode": "none"},
            "the model has the learnable gating function 'luong'.*set gating_type='luong' in mode 'm3po' or 'h3po'",
        ),
        (
            flags_of("bahdanau"),
            "the model has the learnable gating function 'luong'.*gating_type='bahdanau' does not train it",
        ),
        ({**FLAGS, "mode": "m3po"}, "the model has the learnable gating function 'luong'.*gating_type='baseline'"),
        (
            flags_of("luong") | {"gating_config": {"rank": 4}},
            "gating_config rank=4, and the gating function of the model has 8",
        ),
    ],
)
def test_a_run_that_does_not_fit_the_gate_of_its_model_is_refused(
    tiny: Any, tmp_path: Path, flags: dict[str, Any], said: str
):
    with pytest.raises(ValueError, match=said) as error:
        tiny.trainer(tmp_path, flags=flags, model=with_gate(tiny))
    assert "\n" not in str(error.value)


def test_an_adapter_without_a_gate_is_refused(tiny: Any, tmp_path: Path):
    first = tiny.trainer(tmp_path, flags={"mode": "none", "max_steps": 1}, peft_config=LoraConfig(**ADAPTER))
    first.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(tiny.model(), tmp_path / "adapter", is_trainable=True)
    with pytest.raises(
        ValueError, match="the adapter was trained without a learnable gating function, which gating_type='luong'"
    ):
        tiny.trainer(tmp_path, flags=flags_of("luong"), model=loaded)


def test_engines_that_split_the_gate_are_refused(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The type is set by hand: no such engine starts on this machine."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    run = tiny.trainer(tmp_path, flags=flags_of("luong"))
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match="gating_type='luong' cannot be trained with FSDP.*Take DDP"):
        check_trainer(run, run.m3po.settings, [])
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.MULTI_GPU)
    check_trainer(run, run.m3po.settings, [])
    run.args.gating_training = "logits"
    with pytest.raises(ValueError, match="gating_training='logits' cannot be trained by several processes"):
        check_trainer(run, run.m3po.settings, [])
