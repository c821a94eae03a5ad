# SPDX-License-Identifier: Apache-2.0
"""ASLR in training: who gets gradient, its start, its place beside an adapter, what is saved.

That rollout and scoring passes agree is in test_grpo_aslr_agreement.py; its numbers are worked out again in
test_grpo_aslr_numbers.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from reference.families import FAMILIES
from transformers.m3po import read_checkpoint_info
from transformers.m3po.aslr import modules as aslr
from transformers.m3po.aslr.modules import ASLR_MODULES, ASLR_PARAMETERS, attach_aslr
from transformers.m3po.aslr.settings import ASLR_DEFAULTS, ASLR_HYPERPARAMETERS
from trl.trainer.m3po.aslr import latent_statistics
from trl.trainer.m3po.modules import prepare_modules

ON = {"aslr_enabled": True, "answer_start": "#"}
ADAPTER = {"r": 2, "target_modules": "all-linear"}
OPEN = {"m3po_path_aggregator.weight_proj.weight", "m3po_path_aggregator.weight_proj.bias"}
GIVEN = {
    "aslr_num_paths": 4,
    "aslr_max_iterations": 3,
    "aslr_threshold": 0.4,
    "aslr_gumbel_temp": 1.5,
    "aslr_cross_path_lambda": 0.3,
    "aslr_cross_path_temp": 0.2,
}


def lora() -> LoraConfig:
    return LoraConfig(**ADAPTER)


def copies(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in values.items()}


def logits(model: Any) -> torch.Tensor:
    """Of 3 rows, with the noise of given seeds."""
    ids = torch.arange(2, 23).view(3, 7)
    with torch.no_grad():
        return model.eval()(ids, aslr_row_seeds=torch.tensor([5, 6, 7]), is_m3po_inference=False).logits


# Who gets gradient


def blind_key(name: str, gradient: torch.Tensor) -> torch.Tensor:
    """Without the keys' bias, whose gradient is 0: it shifts all logits of a softmax alike."""
    return torch.cat(gradient.chunk(3)[::2]) if name.endswith("in_proj.bias") else gradient


@pytest.mark.parametrize(
    ("mode", "kind", "adapted"),
    [("none", "llama", False), ("m3po", "llama", True), ("h3po", "qwen2", False)],
)
def test_the_open_part_gets_gradient_at_once_the_rest_from_the_second_step_and_all_of_it_moves(
    tiny: Any, tmp_path: Path, mode: str, kind: str, adapted: bool
):
    run = tiny.trainer(
        tmp_path,
        kind,
        flags={**ON, "mode": mode, "max_steps": 20, "max_grad_norm": 0.0, "max_completion_length": 6},
        peft_config=lora() if adapted else None,
    )
    start = copies(tiny.aslr_of(run.model))
    first, *later = tiny.aslr_gradients(run)
    assert first.keys() == set(ASLR_PARAMETERS)
    assert {name for name, gradient in first.items() if gradient.any()} == OPEN
    seen = [[name for name, value in step.items() if blind_key(name, value).any()] for step in later]
    assert set(seen[0]) == set(ASLR_PARAMETERS)
    # A step whose groups got equal rewards has no gradient at all.
    assert {len(names) for names in seen} <= {0, 9} and sum(map(bool, seen)) > 5
    for name, value in tiny.aslr_of(run.model).items():
        assert (blind_key(name, value - start[name]).abs() > 1e-4).float().mean() > 0.95, name


def test_refining_the_last_position_alone_leaves_the_modules_without_gradient(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The logit of that position is dropped in a policy pass: the loss does not see the modules at all."""
    loop = aslr._inner_loop

    def last_alone(*args: Any) -> torch.Tensor:
        return torch.cat([args[-1][:, :-1], loop(*args)[:, -1:]], 1)

    steps = {}
    for name in ("every position", "the last position alone"):
        run = tiny.trainer(tmp_path, flags={**ON, "max_grad_norm": 0.0}, model=tiny.with_aslr())
        steps[name] = tiny.aslr_gradients(run)
        monkeypatch.setattr(aslr, "_inner_loop", last_alone)
    assert not any(value.any() for gradients in steps["the last position alone"] for value in gradients.values())
    assert all(value.any() for gradients in steps["every position"] for value in gradients.values())


# The start


@pytest.mark.parametrize("kind", FAMILIES)
def test_fresh_modules_leave_the_log_probs_of_the_first_rollout_those_of_the_plain_model(
    tiny: Any, tmp_path: Path, kind: str
):
    run = tiny.trainer(tmp_path, kind, flags={**ON, "max_steps": 1, "num_iterations": 2})
    batches = tiny.keep_batches(run)
    run.train()
    (batch,) = batches
    control = tiny.trainer(tmp_path, kind, flags={"mode": "none"})
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        plain = control._get_per_token_logps_and_entropies(control.model, ids, mask, batch["completion_ids"].size(1))[0]
    for found in ("old_per_token_logps", "rollout_logps"):
        difference = (batch[found] - plain) * batch["completion_mask"]
        assert difference.abs().max() < 2e-6, found  # of log-probs up to 7, whose rounding is 5e-7


def test_the_random_state_and_the_adapter_do_not_depend_on_aslr(tiny: Any, tmp_path: Path):
    adapters, states = [], []
    for flags in ({}, ON):
        model = tiny.model()
        torch.manual_seed(3)
        run = tiny.trainer(tmp_path, flags=flags, model=model, peft_config=lora())
        states.append(torch.get_rng_state())
        adapters.append({name: value.clone() for name, value in run.model.named_parameters() if "lora_A" in name})
    plain, with_aslr = adapters
    assert len(plain) == 14 and all(torch.equal(value, with_aslr[name]) for name, value in plain.items())
    assert torch.equal(*states)


@pytest.mark.parametrize(
    ("skipped", "adapted"), [({"aslr_num_paths": 1}, False), ({"aslr_max_iterations": 0}, True)], ids=["full", "lora"]
)
def test_one_latent_path_or_no_round_is_a_run_without_the_loop(
    tiny: Any, tmp_path: Path, adapted: bool, skipped: dict[str, int]
):
    run = tiny.trainer(tmp_path, flags={**ON, **skipped}, peft_config=lora() if adapted else None)
    start = copies(tiny.aslr_of(run.model))
    run.train()
    assert all(map(math.isfinite, tiny.logged(run, "loss"))) and len(tiny.logged(run, "loss")) == 2
    assert max(tiny.logged(run, "m3po/rollout_logp_diff_max")) < 1e-4
    logged = {key for entry in run.state.log_history for key in entry if key.startswith("m3po/")}
    expected = {"rollout_logp_diff", "rollout_logp_diff_max", "distinct_answers"}
    assert logged == {f"m3po/{name}" for name in expected}  # nothing of the loop
    assert all(torch.equal(value, start[name]) for name, value in tiny.aslr_of(run.model).items())


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """Of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("numbers", [{}, {"aslr_num_paths": 1}, {"aslr_max_iterations": 0}], ids=str)
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_ddp_that_does_not_look_for_unused_parameters_finds_none(
    tiny: Any, tmp_path: Path, adapted: bool, numbers: dict[str, int]
):
    """As in a run with gradient checkpointing, TRL's default: DDP stops where a trained module gets no gradient."""
    run = tiny.trainer(tmp_path, flags={**ON, **numbers}, peft_config=lora() if adapted else None)
    model = torch.nn.parallel.DistributedDataParallel(run.model)
    for _ in range(2):
        model(torch.full((2, 5), 7), is_m3po_inference=False).logits.logsumexp(-1).sum().backward()


def test_modules_that_were_cast_are_float32_again_and_train(tiny: Any, tmp_path: Path):
    """As TRL casts what is trainable on quantised base weights, which cannot be loaded here."""
    run = tiny.trainer(tmp_path, flags=ON, peft_config=lora())
    for value in run.model.parameters():
        value.data = value.data.to(torch.bfloat16)
    prepare_modules(run.model, run.args)
    assert {value.dtype for value in tiny.aslr_of(run.model).values()} == {torch.float32}
    assert all(value.requires_grad for name, value in run.model.named_parameters() if "modules_to_save.default" in name)


def test_gradient_norms_leave_out_the_scale_of_the_loss(tiny: Any):
    model = tiny.model()
    attach_aslr(model)
    model(torch.full((2, 5), 7), is_m3po_inference=False).logits.logsumexp(-1).sum().backward()
    plain, scaled = latent_statistics(model, 1.0), latent_statistics(model, 1024.0)
    norm = "path_aggregator_grad_norm"
    assert plain[norm] > 0 and torch.equal(plain[norm], 1024.0 * scaled[norm])


def test_distance_from_the_start_is_logged_for_each_module(tiny: Any, tmp_path: Path):
    """0 before the first step; the aggregator moves first, the others from the second step on."""
    run = tiny.trainer(tmp_path, flags={**ON, "max_steps": 3, "max_completion_length": 6})
    start = copies(tiny.aslr_of(run.model))
    run.train()
    logged = {
        name: tiny.logged(run, f"m3po/{name}_distance") for name in ("router", "path_collaborator", "path_aggregator")
    }
    assert [values[0] for values in logged.values()] == [0.0, 0.0, 0.0]
    assert logged["path_aggregator"][1] > 0 == logged["router"][1] == logged["path_collaborator"][1]
    assert all(values[2] > 0 for values in logged.values())

    assert any((value - start[name]).norm() > 0 for name, value in tiny.aslr_of(run.model).items())


# Beside the model's dtype and an adapter


@pytest.mark.parametrize(
    ("adapted", "autocast"), [(True, False), (False, True)], ids=["lora, bf16 weights", "full, bf16 autocast"]
)
def test_the_modules_are_float32_and_train_whatever_the_dtype_of_the_model(
    tiny: Any, tmp_path: Path, adapted: bool, autocast: bool
):
    model = tiny.model() if autocast else tiny.model().to(torch.bfloat16)
    flags = {**ON, "bf16": autocast, "max_steps": 3}
    run = tiny.trainer(tmp_path, flags=flags, model=model, peft_config=lora() if adapted else None)
    start = copies(tiny.aslr_of(run.model))
    assert {value.dtype for value in start.values()} == {torch.float32} and len(start) == 9
    assert all(value.requires_grad for value in tiny.aslr_of(run.model).values())
    run.train()
    assert {value.dtype for value in tiny.aslr_of(run.model).values()} == {torch.float32}
    assert not any(torch.equal(value, start[name]) for name, value in tiny.aslr_of(run.model).items())
    assert 0 < max(tiny.logged(run, "m3po/rollout_logp_diff")) < 0.1  # rounding to 8 bits
    trained = [value for value in run.model.parameters() if value.requires_grad]
    held = [value for group in run.optimizer.param_groups for value in group["params"]]
    assert len(held) == len(trained) and {id(value) for value in held} == {id(value) for value in trained}


def test_the_adapter_saves_the_modules_whole_and_lays_no_lora_on_them(tiny: Any, tmp_path: Path):
    given = LoraConfig(r=2, target_modules=r".*(q_proj|in_proj|out_proj|weight_proj|gate)", modules_to_save=["lm_head"])
    before = given.to_dict()
    run = tiny.trainer(tmp_path, flags=ON, peft_config=given)
    assert given.to_dict() == before  # the user's object
    assert set(run.model.peft_config["default"].modules_to_save) == {"lm_head", *ASLR_MODULES}
    wrapped = {name.split(".lora_")[0].split(".")[-1] for name, _ in run.model.named_parameters() if ".lora_" in name}
    assert wrapped == {"q_proj"}
    everything = tiny.trainer(tmp_path, flags={**ON, "mode": "h3po"}, peft_config=lora()).model
    adapted = [name for name, _ in everything.named_parameters() if ".lora_" in name]
    assert adapted and not any("m3po_" in name or "thinking_residual" in name for name in adapted)
    used = [name for name, value in everything.named_parameters() if value.requires_grad and "m3po_" in name]
    assert len(used) == 9 and all("modules_to_save.default" in name for name in used)
    assert len(everything.peft_config["default"].modules_to_save) == 6


# Model and arguments


@pytest.mark.parametrize("said", [None, True])
def test_a_model_with_aslr_lends_its_numbers_to_a_run_that_leaves_them_open(tiny: Any, tmp_path: Path, said: Any):
    model = tiny.with_aslr(**GIVEN)
    start = copies(tiny.aslr_of(model))
    run = tiny.trainer(tmp_path, flags={"aslr_enabled": said, "aslr_threshold": 0.6, "max_steps": 1}, model=model)
    assert all(torch.equal(value, start[name]) for name, value in tiny.aslr_of(run.model).items())  # not made anew
    expected = GIVEN | {"aslr_enabled": True, "aslr_threshold": 0.6}
    assert {name: getattr(run.args, name) for name in expected} == expected
    assert {name: getattr(run.model.config, name) for name in expected} == expected
    run.train()
    assert len(tiny.logged(run, "m3po/router_weight_mean")) == 1


@pytest.mark.parametrize("said", [None, False])
def test_a_plain_model_stays_plain_unless_asked(tiny: Any, tmp_path: Path, said: Any):
    run = tiny.trainer(tmp_path, flags={"aslr_enabled": said})
    assert not tiny.aslr_of(run.model) and run.args.aslr_enabled is False
    assert all(getattr(run.args, name) is None for name in ASLR_HYPERPARAMETERS)
    run.save_model()
    for file in ("m3po.json", "config.json"):
        assert "aslr" not in (tmp_path / file).read_text(encoding="utf-8")


def test_what_is_left_open_on_a_plain_model_gets_the_defaults(tiny: Any, tmp_path: Path):
    run = tiny.trainer(tmp_path, flags=ON)
    assert {name: getattr(run.args, name) for name in ASLR_HYPERPARAMETERS} == ASLR_DEFAULTS
    assert {name: getattr(run.model.config, name) for name in ASLR_HYPERPARAMETERS} == ASLR_DEFAULTS


@pytest.mark.parametrize("mode", ["none", "m3po"])
def test_a_run_without_aslr_refuses_a_model_that_has_it(tiny: Any, tmp_path: Path, mode: str):
    for given in ({}, {"peft_config": lora()}):
        with pytest.raises(ValueError, match=r"^aslr_enabled=False, and the model has ASLR .*: leave the flag out, or"):
            tiny.trainer(tmp_path, flags={"mode": mode, "aslr_enabled": False}, model=tiny.with_aslr(), **given)


def test_a_number_of_aslr_without_it_is_refused(tiny: Any, tmp_path: Path):
    for name, enabled in zip(ASLR_HYPERPARAMETERS, (None, False) * 3, strict=True):
        expected = f"^{name} does nothing without ASLR: set aslr_enabled=True, or leave it out"
        with pytest.raises(ValueError, match=expected):
            tiny.trainer(tmp_path, flags={"aslr_enabled": enabled, name: ASLR_DEFAULTS[name]})


def test_another_number_of_latent_paths_than_the_models_is_refused(tiny: Any, tmp_path: Path):
    with pytest.raises(ValueError, match=r"^aslr_num_paths=6: the path aggregator of this model was built for 4\."):
        tiny.trainer(tmp_path, flags={"aslr_num_paths": 6}, model=tiny.with_aslr())
    assert tiny.trainer(tmp_path, flags={**ON, "aslr_num_paths": 6}).model.config.aslr_num_paths == 6  # fresh ones


def test_a_hidden_size_that_the_heads_do_not_divide_is_refused(tiny: Any, tmp_path: Path):
    kind = type(tiny.model())
    config = tiny.model().config.to_dict() | {"hidden_size": 36, "head_dim": 8}
    with pytest.raises(ValueError, match="^aslr_enabled=True needs a hidden size that the 8 heads.*this model has 36"):
        tiny.trainer(tmp_path, flags=ON, model=kind(kind.config_class(**config)))


def test_an_adapter_without_aslr_is_refused_by_a_run_with_it(tiny: Any, tmp_path: Path):
    plain = tiny.trainer(tmp_path, flags={}, peft_config=lora()).model
    plain.save_pretrained(tmp_path / "adapter")
    said = "^the adapter was trained without ASLR, which aslr_enabled=True needs; merge it into its base"
    for base in (tiny.model(), tiny.with_aslr()):
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
        with pytest.raises(ValueError, match=said):
            tiny.trainer(tmp_path, flags=ON, model=loaded)


@pytest.mark.parametrize("said", [None, True, False])
def test_an_adapter_with_aslr_on_a_base_model_without_is_refused(tiny: Any, tmp_path: Path, said: Any):
    """PEFT loads such an adapter without a word, and without its modules."""
    tiny.trainer(tmp_path, flags=ON, peft_config=lora()).save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(tiny.model(), tmp_path / "adapter", is_trainable=True)
    said_to_the_user = "^the adapter has ASLR and its base model has none.*load the base model with aslr_enabled=True"
    with pytest.raises(ValueError, match=said_to_the_user):
        tiny.trainer(tmp_path, flags={"aslr_enabled": said}, model=loaded)


# What is saved


@pytest.mark.parametrize(("mode", "adapted"), [("none", True), ("m3po", False)], ids=["none, lora", "m3po, full"])
def test_what_is_saved_has_the_logits_of_the_run_and_its_numbers(tiny: Any, tmp_path: Path, adapted: bool, mode: str):
    """Numbers that override those of the start model, in m3po.json and, of a whole model, in config.json."""
    other = {"aslr_threshold": 0.7, "aslr_gumbel_temp": 0.5}
    run = tiny.trainer(
        tmp_path,
        flags={**ON, **other, "mode": mode, "save_strategy": "steps", "save_steps": 1},
        model=tiny.with_aslr(**GIVEN),
        peft_config=lora() if adapted else None,
    )
    run.train()
    run.save_model(str(tmp_path / "export"))
    expected = GIVEN | other | {"aslr_enabled": True}
    for folder in (tmp_path / "checkpoint-1", tmp_path / "checkpoint-2", tmp_path / "export"):
        info = read_checkpoint_info(folder)
        assert {name: value for name, value in info.items() if "aslr" in name} == expected
        assert info["mode"] == mode
        if not adapted:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            assert {name: value for name, value in config.items() if "aslr" in name} == expected
    if adapted:
        base = tiny.model()
        attach_aslr(base, **{name: expected[name] for name in ASLR_HYPERPARAMETERS})
        base.load_state_dict(tiny.with_aslr().state_dict())
        loaded = PeftModel.from_pretrained(base, tmp_path / "export")
    else:
        loaded = type(tiny.model()).from_pretrained(tmp_path / "export")
    assert torch.equal(logits(loaded), logits(run.model))
    assert (logits(tiny.with_aslr(**GIVEN)) - logits(run.model)).abs().max() > 0.1  # it has trained


def test_a_policy_loaded_without_its_aslr_has_a_reference_without_it(tiny: Any, tmp_path: Path):
    """TRL loads the reference by the policy's name, where ASLR is on."""
    trained = tiny.with_aslr()
    trained.save_pretrained(tmp_path / "start")
    plain = type(trained).from_pretrained(tmp_path / "start", aslr_enabled=False)
    run = tiny.trainer(tmp_path / "run", flags={"beta": 0.1, "max_steps": 1}, model=plain)
    run.train()
    assert tiny.logged(run, "kl")[0] < 1e-8


@pytest.mark.parametrize("mode", ["none", "m3po"])
def test_a_number_among_the_generation_kwargs_is_refused(tiny: Any, tmp_path: Path, mode: str):
    flags = {**ON, "mode": mode, "generation_kwargs": {"aslr_max_iterations": 0}, "max_steps": 1}
    with pytest.raises(ValueError, match="aslr_max_iterations"):
        tiny.trainer(tmp_path, flags=flags).train()
