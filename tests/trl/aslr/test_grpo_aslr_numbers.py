# SPDX-License-Identifier: Apache-2.0
"""ASLR's numbers in a run, worked out again: the gradient of its modules, and what is logged of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.m3po import M3POGenerationState
from transformers.m3po.aslr.modules import ASLR_MODULES
from transformers.m3po.aslr.noise import latent_noise
from transformers.m3po.aslr.settings import ASLR_DEFAULTS

ON = {"aslr_enabled": True, "answer_start": "#"}
ADAPTER = {"r": 2, "target_modules": "all-linear"}
NUMBERS = {
    "aslr_num_paths": 3,
    "aslr_max_iterations": 3,
    "aslr_threshold": 0.4,
    "aslr_gumbel_temp": 1.5,
    "aslr_cross_path_lambda": 0.3,
    "aslr_cross_path_temp": 0.2,
}
# What a rollout says of the loop, and a step of the modules.
ROUTED = ("router_weight_mean", "activation_rate_actual", "latent_diversity_before", "latent_diversity_after")
NORMS = tuple(f"m3po/{name.removeprefix('m3po_')}_grad_norm" for name in ASLR_MODULES)
DISTANCES = tuple(name.replace("grad_norm", "distance") for name in NORMS)
METRICS = {*(f"m3po/{name}" for name in ROUTED), "m3po/aggregator_weight_entropy", *NORMS, *DISTANCES}


def test_the_gradient_is_that_of_the_written_out_loss_in_float64(tiny: Any, tmp_path: Path):
    """Of every position at which a token was sampled, weighed by its advantage."""
    run = tiny.trainer(tmp_path, flags={**ON, "max_steps": 1, "max_grad_norm": 0.0}, model=tiny.with_aslr())
    batches = tiny.keep_batches(run)
    (found,) = tiny.aslr_gradients(run)
    (batch,) = batches
    net = tiny.with_aslr().double()
    states, refined = written_out(net, batch, ASLR_DEFAULTS)[:2]
    assert (refined - states).abs().max() > 0.1
    logps = net.lm_head(refined).log_softmax(-1).gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
    gain = (logps - logps.detach()).exp() * batch["advantages"].double().unsqueeze(1) * batch["completion_mask"]
    (-gain.sum() / batch["completion_mask"].sum()).backward()
    for name, value in tiny.aslr_of(net).items():
        assert value.grad.abs().max() > 1e-4, name
        assert (found[name] - value.grad).abs().max() < 1e-4 * value.grad.abs().max(), name


def written_out(net: Any, batch: dict[str, Any], numbers: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """The equations of ASLR in the dtype of `net`, at the states that the completion tokens were sampled from.

    States and refined states (B, C, H), router score (B, C), spread of the latent paths at the start and the end.
    """
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    base, cut = net.model, slice(batch["prompt_ids"].size(1) - 1, -1)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "is_m3po_inference": True}
    s = base(**given).last_hidden_state[:, cut]
    count, size = numbers["aslr_num_paths"], s.shape[-1]
    scale = s.pow(2).mean(-1, keepdim=True).sqrt()
    router, attention, aggregator = (getattr(base, name) for name in ASLR_MODULES)
    g = torch.sigmoid(F.linear(s, router.gate.weight, router.gate.bias)).squeeze(-1)

    def noise(k: int) -> list[torch.Tensor]:
        drawn = latent_noise(batch["rollout_row_seeds"], positions[:, cut], count, k, size).to(s.dtype)
        return list((0.1 * numbers["aslr_gumbel_temp"] * drawn).unbind(-2))

    paths = begin = [s / scale + n for n in noise(0)]
    for k in range(numbers["aslr_max_iterations"]):
        heard = [x + n for x, n in zip(paths, noise(k), strict=True)] if k else paths
        queries, keys, values = zip(
            *[F.linear(x, attention.in_proj.weight, attention.in_proj.bias).chunk(3, -1) for x in heard], strict=True
        )
        said = []
        for query in queries:
            heads = []
            for part in range(8):
                own = slice(part * size // 8, (part + 1) * size // 8)
                scores = torch.stack([(query[..., own] * key[..., own]).sum(-1) for key in keys], -1)
                weights = (scores / math.sqrt(size // 8) / numbers["aslr_cross_path_temp"]).softmax(-1)
                heads.append(sum(weights[..., j, None] * values[j][..., own] for j in range(count)))
            said.append(F.linear(torch.cat(heads, -1), attention.out_proj.weight, attention.out_proj.bias))
        share = numbers["aslr_cross_path_lambda"]
        paths = [(1 - share) * x + share * y for x, y in zip(paths, said, strict=True)]
    weights = aggregator.weight.softmax(0)
    mean = sum(weight * x for weight, x in zip(weights, paths, strict=True))
    added = F.linear(mean, aggregator.weight_proj.weight, aggregator.weight_proj.bias)
    refined = s + torch.sigmoid(10 * (g - numbers["aslr_threshold"])).unsqueeze(-1) * scale * added

    def spread(of: list[torch.Tensor]) -> torch.Tensor:
        center = sum(of) / count
        return (sum((x - center).pow(2) for x in of) / count).mean(-1).sqrt()

    return s, refined, g, spread(begin), spread(paths)


# What is logged


@pytest.mark.parametrize("flags", [{}, {"mode": "m3po"}, {"mode": "h3po"}], ids=["none", "m3po", "h3po"])
def test_a_run_logs_the_numbers_of_aslr_at_each_step_and_the_same_run_without_logs_none(
    tiny: Any, tmp_path: Path, flags: dict[str, Any]
):
    found = []
    for more in (ON, {"answer_start": "#"}):
        run = tiny.trainer(tmp_path, flags={**flags, **more, "thinking_residual_r_min": 0.3, "max_steps": 3})
        run.train()
        found.append([{key for key in entry if key.startswith("m3po/")} for entry in run.state.log_history[:3]])
    for with_aslr, without in zip(*found, strict=True):
        assert with_aslr - without == METRICS and without < with_aslr


@pytest.mark.parametrize("mode", ["none", "m3po"])
def test_the_numbers_of_the_loop_are_those_of_the_equations_at_the_sampled_tokens(tiny: Any, tmp_path: Path, mode: str):
    """Worked out again in float64, a path at a time; λ = 0, so that mode m3po reads plain tokens as the check does."""
    flags = {**ON, "mode": mode, "cross_path_lambda": 0.0, "max_steps": 1}
    run = tiny.trainer(tmp_path, flags=flags, model=tiny.with_aslr(**NUMBERS))
    batches = tiny.keep_batches(run)
    run.train()
    (batch,) = batches
    with torch.no_grad():
        _, _, score, before, after = written_out(tiny.with_aslr(**NUMBERS).double(), batch, NUMBERS)
    sampled = batch["completion_mask"].bool()
    assert 20 < sampled.sum() < sampled.numel()
    values = dict(zip(ROUTED, (score, (score > 0.4).double(), before, after), strict=True))
    assert 0.1 < values["activation_rate_actual"][sampled].mean() < 0.9
    for name, value in values.items():
        assert tiny.logged(run, f"m3po/{name}") == pytest.approx([value[sampled].mean().item()], rel=1e-5), name


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_the_gradient_norms_are_those_of_the_whole_step_before_clipping(tiny: Any, tmp_path: Path, adapted: bool):
    flags = {**ON, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_grad_norm": 1e-3}
    run = tiny.trainer(
        tmp_path, flags={**flags, "max_steps": 3}, peft_config=LoraConfig(**ADAPTER) if adapted else None
    )
    clip, expected, entropies = run.accelerator.clip_grad_norm_, [], []

    def watched_clip(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        squares = dict.fromkeys(ASLR_MODULES, 0.0)
        for name, value in tiny.aslr_of(run.model).items():
            squares[name.split(".")[0]] += value.grad.double().pow(2).sum().item()
        expected.append([math.sqrt(square) for square in squares.values()])
        shares = tiny.aslr_of(run.model)["m3po_path_aggregator.weight"].detach().double().softmax(0)
        entropies.append(-(shares * shares.log()).sum().item())
        return clip(parameters, *args, **kwargs)

    run.accelerator.clip_grad_norm_ = watched_clip
    run.train()
    found = [tiny.logged(run, name) for name in NORMS]
    assert [len(values) for values in found] == [3, 3, 3]
    for step, (norms, logged) in enumerate(zip(expected, zip(*found, strict=True), strict=True)):
        assert list(logged) == pytest.approx(norms, rel=1e-5), step
        assert (logged[0] == logged[1] == 0) == (step == 0)
        assert logged[2] > 1e-2  # above what clipping leaves
    assert tiny.logged(run, "m3po/aggregator_weight_entropy") == pytest.approx(entropies, rel=1e-6)
    assert entropies[0] == pytest.approx(math.log(4)) and entropies[2] < entropies[0]


def test_the_gradient_norm_beside_a_reference_adapter_is_that_of_the_trained_copy(tiny: Any, tmp_path: Path):
    first = tiny.trainer(
        tmp_path, flags={**ON, "max_steps": 1}, model=tiny.with_aslr(), peft_config=LoraConfig(**ADAPTER)
    )
    first.train()
    first.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(tiny.with_aslr(), tmp_path / "adapter", is_trainable=True)
    run = tiny.trainer(tmp_path, flags={**ON, "beta": 0.1, "max_steps": 2, "max_grad_norm": 0.0}, model=loaded)
    steps = tiny.aslr_gradients(run)
    for name, logged in zip(ASLR_MODULES, NORMS, strict=True):
        norms = [torch.stack([g.norm() for key, g in step.items() if name in key]).norm().item() for step in steps]
        assert tiny.logged(run, logged) == pytest.approx(norms, rel=1e-5)
        assert min(norms) > 0


def test_the_numbers_of_the_loop_are_logged_in_an_evaluation_too(tiny: Any, tmp_path: Path):
    flags = {**ON, "per_device_eval_batch_size": 4}
    run = tiny.trainer(tmp_path, flags=flags, model=tiny.with_aslr(), eval_dataset=tiny.prompts().select(range(2)))
    found = run.evaluate()
    assert {key for key in found if key.removeprefix("eval_") in METRICS} == {f"eval_m3po/{name}" for name in ROUTED}


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for the device: `.item()`, `bool()` and the like, sizes that depend on data."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique")
        self.count += any(name in str(func) for name in waits)
        return func(*args, **(kwargs or {}))


def test_the_loop_never_makes_the_host_wait_for_the_device(tiny: Any):
    """As many reads with 8 rows as with 2, in a rollout of 6 steps and in a scoring pass, and as many as without it."""
    counts = {}
    for name, model in (("plain", tiny.model()), ("aslr", tiny.with_aslr())):
        model.generation_config.eos_token_id = None
        for rows in (2, 8):
            ids, extra = torch.full((rows, 5), 7), {}
            if name == "aslr":
                extra = {"aslr_row_seeds": torch.arange(rows), "is_m3po_inference": False}
            with Reads() as rollout:
                state = M3POGenerationState()
                out = model.generate(ids, do_sample=True, max_new_tokens=6, top_k=0, pad_token_id=0, m3po=state)
            assert out.shape == (rows, 11) and len(state.statistics) == (4 if name == "aslr" else 0)
            with Reads() as scoring:
                model(out, **extra).logits.logsumexp(-1).sum().backward()
            counts[name, rows] = rollout.count, scoring.count
    assert counts["aslr", 2] == counts["aslr", 8] == counts["plain", 8]
