# SPDX-License-Identifier: Apache-2.0
"""ASLR on a model: its noise, its formula and gradient, its start, its numbers, and how it is saved and loaded."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import pickle
import shutil

import numpy as np
import pytest
import torch
from reference import aslr
from reference.latent import (
    aslr_parameters,
    positions_of,
    randomise,
    reference_modules,
    reference_numbers,
    token_indices,
    with_aslr,
)
from reference.tiny import left_padded
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    Qwen2Config,
    StaticCache,
    m3po,
)
from transformers.m3po.aslr import modules as product
from transformers.m3po.aslr.modules import ASLR_MODULES, ASLR_PARAMETERS, attach_aslr, path_spread, refine_states
from transformers.m3po.aslr.noise import latent_noise
from transformers.m3po.modules import ASLR
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2

ON = {"aslr_enabled": True}
DEFAULTS = {
    "aslr_num_paths": 4,
    "aslr_max_iterations": 2,
    "aslr_threshold": 0.5,
    "aslr_gumbel_temp": 1.0,
    "aslr_cross_path_lambda": 0.1,
    "aslr_cross_path_temp": 0.1,
}
NAMES = {f"model.{name}" for name in ASLR_PARAMETERS}
SEEDS = [11, 2**31 - 1, 0]
CLOSE = 1e-5


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["llama", "qwen2"])
def make(request, tiny_llama, tiny_qwen2):
    """Makes tiny plain models of 64 tokens; `make(**ON)` makes one with the modules at their start."""
    build = {"llama": tiny_llama, "qwen2": tiny_qwen2}[request.param]
    return lambda **config: build(**{"vocab_size": 64, "intermediate_size": 32, **config})


def batch(lengths=(4, 2, 3)):
    """Left-padded tokens with their mask, their position ids and the seeds of their rows."""
    given = left_padded(list(lengths), first=3, last=64)
    seeds = torch.tensor(SEEDS[: len(lengths)])
    return {**given, "position_ids": positions_of(given["attention_mask"])}, {
        "is_m3po_inference": False,
        "aslr_row_seeds": seeds,
    }


def logits_of(model, **inputs):
    """Logits of `batch` with ASLR running, unless the inputs say otherwise."""
    tokens, latent = batch()
    with torch.no_grad():
        return model(**{**tokens, **latent, **inputs}).logits


def assert_computes_the_same(one, other):
    """Equal weights, but not bit for bit: where a loaded tensor lies in memory decides how its sums are split."""
    rounding = 1e-6 if one.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(one, other, atol=rounding, rtol=rounding)


@contextlib.contextmanager
def heard():
    """The warnings of `transformers.m3po.aslr.modules` as a list that fills; what was said once may be said again."""
    logger, messages, handler = (
        logging.getLogger("transformers.m3po.aslr.modules"),
        [],
        logging.Handler(logging.WARNING),
    )
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.Logger.warning_once.cache_clear()
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


# --- the noise


# (row seed, token, round, path, unit): the 24-bit numerator of u and the noise, of the reference as first written.
KNOWN = {
    (0, 0, 0, 0, 0): (5187449, -0.5749833031298892),
    (1, 0, 0, 0, 0): (11596917, 0.3266755812906988),
    (0, 1, 0, 0, 0): (9716789, 0.021531816343990276),
    (0, 0, 1, 0, 0): (12445983, 0.4922653506848005),
    (0, 0, 0, 1, 0): (15725341, 1.6841703180819039),
    (0, 0, 0, 0, 1): (11908697, 0.3848038564608638),
    (12345, 17, 2, 3, 31): (5885549, -0.48625229803962516),
    (2**31 - 1, 511, 1, 0, 5): (10906935, 0.2068588109079194),
}


@pytest.mark.parametrize("where", list(KNOWN))
def test_the_noise_has_its_known_answers(where):
    seed, token, round_index, path, unit = where
    numerator, value = KNOWN[where]
    assert aslr.uniform(*where) * 2**24 == numerator and aslr.noise(*where) == pytest.approx(value, abs=1e-14)
    mine = latent_noise(torch.tensor([seed]), torch.tensor([[token]]), path + 1, round_index, unit + 1)
    assert mine[0, 0, path, unit].item() == pytest.approx(value, abs=2e-6)


def test_the_noise_is_that_of_the_reference():
    """Each token of a row its own index; also seeds and tokens of other sizes and types than those of a rollout."""
    seeds = [5, 2**31 - 1, 2**32 - 1]
    tokens = torch.tensor([[0, 0, 1, 2], [7, 8, 131071, 10], [1, 0, 3, 2**31 - 1]])
    for round_index in (0, 3):
        mine = latent_noise(torch.tensor(seeds), tokens, 3, round_index, 9)
        assert mine.dtype == torch.float32 and mine.shape == (3, 4, 3, 9)
        expected = [
            [[aslr.noise_vector(seed, token, round_index, path, 9) for path in range(3)] for token in row]
            for seed, row in zip(seeds, tokens.tolist(), strict=True)
        ]
        torch.testing.assert_close(mine.double(), torch.tensor(np.array(expected)), atol=2e-6, rtol=2e-6)
    other = latent_noise(torch.tensor([5, 2**32 + 5, 5 - 2**32]), tokens[:1].int(), 3, 3, 9)
    assert torch.equal(
        other, latent_noise(torch.tensor([5], dtype=torch.int32), tokens[:1], 3, 3, 9).expand(3, -1, -1, -1)
    )


def test_a_million_numbers_are_finite_gumbel_numbers_of_mean_zero_and_variance_one():
    noise = latent_noise(torch.arange(8), torch.arange(128)[None], 8, 1, 128).double().flatten()
    assert noise.numel() == 2**20 and noise.isfinite().all()
    # Four standard errors; the fourth moment of a Gumbel number of variance one is 5.4.
    assert abs(noise.mean()) < 4e-3 and abs(noise.var() - 1) < 4 * 2.1e-3
    gumbel = noise.sort().values * math.pi / math.sqrt(6) + aslr.GAMMA
    ranks = (torch.arange(2**20, dtype=torch.float64) + 0.5) / 2**20
    # Kolmogorov and Smirnov: in 999 of 1,000 cases the distance stays below 1.95 / sqrt(n).
    assert ((-(-gumbel).exp()).exp() - ranks).abs().max() < 1.95 / 2**10


@pytest.mark.parametrize("axis", ["seed", "token", "round", "path", "unit"])
def test_the_noise_is_independent_along_every_axis(axis):
    """Neighbours, and numbers 2 and 16 apart: for a hash of small whole numbers these are the hardest."""
    rounds = torch.stack([latent_noise(torch.arange(17), torch.arange(20)[None], 17, r, 20) for r in range(17)])
    numbers = rounds.movedim({"round": 0, "seed": 1, "token": 2, "path": 3, "unit": 4}[axis], 0).flatten(1)
    for apart in (1, 2, 16):
        one, other = numbers[:-apart].flatten(), numbers[apart:].flatten()
        both = torch.stack([one, other])
        size = one.numel()
        assert size > 10**5
        # The numbers, their squares and their signs, up to 4.5 standard errors (45 correlations are looked at).
        for change in (torch.clone, torch.square, torch.sign):
            assert abs(torch.corrcoef(change(both))[0, 1]) < 4.5 / size**0.5, (apart, change)


def test_no_two_places_share_their_noise():
    """Not even those that a sum or an exclusive or of the coordinates would mix up."""
    rounds = [latent_noise(torch.arange(12), torch.arange(12)[None], 12, r, 12).flatten() for r in range(12)]
    numbers = torch.cat(rounds)
    # 2^23 values, 12^5 = 248,832 numbers: by chance 245,178 of them differ, give or take 60.
    assert abs(numbers.unique().numel() - 245178) < 400
    vectors = torch.cat([r.view(-1, 12) for r in rounds])
    assert vectors.unique(dim=0).shape == vectors.shape


def test_the_noise_of_a_token_does_not_depend_on_what_else_is_computed():
    seeds, tokens = torch.tensor([5, 9, 1]), torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7], [0, 0, 0, 1]])
    whole = latent_noise(seeds, tokens, 4, 1, 16)
    assert torch.equal(latent_noise(seeds[[2, 0]], tokens[[2, 0]], 4, 1, 16), whole[[2, 0]])
    assert torch.equal(latent_noise(seeds, tokens[:, 2:3], 4, 1, 16), whole[:, 2:3])
    assert torch.equal(latent_noise(seeds, tokens, 2, 1, 8), whole[:, :, :2, :8])
    assert torch.equal(latent_noise(seeds[1:2], tokens[1:2].flip(1), 4, 1, 16), whole[1:2].flip(1))
    one_for_all = latent_noise(seeds, tokens[:1], 4, 1, 16)
    assert torch.equal(one_for_all, latent_noise(seeds, tokens[:1].expand(3, -1), 4, 1, 16))


def test_the_noise_leaves_torchs_generator_and_its_arguments_be():
    seeds, tokens, state = torch.tensor([5, 9]), torch.tensor([[0, 1], [2, 3]]), torch.get_rng_state()
    noise = latent_noise(seeds, tokens, 4, 1, 16)
    assert torch.equal(torch.get_rng_state(), state) and not noise.requires_grad
    assert seeds.tolist() == [5, 9] and tokens.tolist() == [[0, 1], [2, 3]]


# --- the formula


def states_and_reference(plain, model, **overrides):
    """last_hidden_state of a plain model, and what the reference makes of it with the modules of `model`."""
    tokens, latent = batch()
    with torch.no_grad():
        states = plain.model(**tokens).last_hidden_state
    indices = token_indices(tokens["attention_mask"])
    numbers = reference_numbers(model, **overrides)
    seeds = latent["aslr_row_seeds"].tolist()
    return states, aslr.refine(states.double().numpy(), seeds, indices, reference_modules(model), numbers)


def refined_with_trace(model, **inputs):
    """last_hidden_state (B, L, H) and the trace (B, L, 3) of `batch`, and where its tokens are."""
    tokens, latent = batch()
    trace = torch.full((*tokens["input_ids"].shape, 3), torch.nan)
    with torch.no_grad():
        states = model.model(**tokens, **latent, aslr_trace=trace, **inputs).last_hidden_state
    return states, trace, tokens["attention_mask"].bool()


def assert_refines_as(expected, states, trace, real, tolerance=CLOSE):
    """States relative to their size, which is that of z; score and spreads."""
    torch.testing.assert_close(
        states[real].double(), torch.tensor(expected.states)[real], atol=tolerance, rtol=tolerance
    )
    measured = torch.tensor(np.stack(expected[1:], axis=-1))
    torch.testing.assert_close(trace[real].double(), measured[real], atol=CLOSE, rtol=CLOSE)


@pytest.mark.parametrize(
    "numbers",
    [
        {},
        {"num_paths": 2, "max_iterations": 1},
        {"num_paths": 5, "max_iterations": 3, "cross_path_lambda": 0.5},
        {"cross_path_lambda": 0.0},
        {"cross_path_lambda": 1.0, "cross_path_temp": 1.0},
        {"cross_path_temp": 5.0, "cross_path_lambda": 0.7},
        {"gumbel_temp": 0.0, "cross_path_lambda": 0.3},
        {"gumbel_temp": 4.0},
        {"threshold": 0.0},
        {"threshold": 1.0},
    ],
)
def test_a_forward_refines_as_the_reference_does(make, numbers):
    plain = make(initializer_range=0.2)
    plain.model.norm.weight.data.uniform_(0.2, 0.8)  # else ρ is 1
    model = with_aslr(plain, **numbers)
    states, expected = states_and_reference(plain, model)
    refined, trace, real = refined_with_trace(model)
    assert_refines_as(expected, refined, trace, real)
    moved = (refined - states)[real].abs().mean()
    assert moved > (1e-3 if numbers.get("threshold") == 1.0 else 0.05), "a poor case"


def test_a_wider_model_refines_as_the_reference_does(make):
    plain = make(hidden_size=64, num_hidden_layers=1)
    model = with_aslr(plain, cross_path_lambda=0.4)
    assert_refines_as(states_and_reference(plain, model)[1], *refined_with_trace(model))


def test_every_number_and_every_parameter_moves_the_output(make):
    """So that the agreement above means something."""
    plain = make(initializer_range=0.2)
    model = with_aslr(plain, cross_path_lambda=0.4, cross_path_temp=0.5)
    before = logits_of(model)
    other = {
        "max_iterations": 3,
        "threshold": 0.6,
        "gumbel_temp": 2.0,
        "cross_path_lambda": 0.6,
        "cross_path_temp": 1.0,
    }
    for name, value in other.items():
        assert (logits_of(model, **{f"aslr_{name}": value}) - before).abs().max() > 1e-3, name
    assert (logits_of(model, aslr_row_seeds=torch.tensor([1, 2, 3])) - before).abs().max() > 1e-2
    assert not torch.allclose(logits_of(model, position_ids=torch.arange(4)[None]), before, atol=1e-3)
    for name, p in zip(ASLR_PARAMETERS, aslr_parameters(model), strict=True):
        kept = p.detach().clone()
        with torch.no_grad():
            p.mul_(torch.linspace(0.5, 1.5, p.numel()).view_as(p))
        assert (logits_of(model) - before).abs().max() > 1e-4, name
        p.data.copy_(kept)


def test_a_row_is_refined_alike_in_every_batch_and_under_any_padding(make):
    model = with_aslr(make(initializer_range=0.2))
    tokens, latent = batch()
    whole = logits_of(model)
    for row, length in enumerate((4, 2, 3)):
        ids = tokens["input_ids"][row : row + 1, -length:]
        with torch.no_grad():
            alone = model(ids, is_m3po_inference=False, aslr_row_seeds=latent["aslr_row_seeds"][row : row + 1]).logits
        torch.testing.assert_close(alone, whole[row : row + 1, -length:], atol=CLOSE, rtol=CLOSE)


def test_the_trace_is_that_of_the_last_positions(make):
    model = with_aslr(make())
    _, whole, _ = refined_with_trace(model)
    tokens, latent = batch()
    for width in (1, 3):
        trace = torch.zeros(3, width, 3)
        model(**tokens, **latent, aslr_trace=trace)
        assert torch.equal(trace, whole[:, -width:])


@pytest.mark.parametrize("way", ["bf16 model", "autocast"])
def test_in_bfloat16_the_modules_stay_and_compute_in_float32(make, way):
    plain = make(initializer_range=0.2)
    plain = plain.to(torch.bfloat16) if way == "bf16 model" else plain
    model = with_aslr(plain, cross_path_lambda=0.4)
    assert {p.dtype for p in aslr_parameters(model)} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        states, expected = states_and_reference(plain, model)
        refined, trace, real = refined_with_trace(model)
    assert refined.dtype == states.dtype == (torch.bfloat16 if way == "bf16 model" else torch.float32)
    assert_refines_as(expected, refined, trace, real, tolerance=CLOSE if way == "autocast" else 2**-8)
    tokens, latent = batch()
    narrow, positions = states.bfloat16(), tokens["position_ids"]
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        rounded = refine_states(model.model, narrow, positions, latent)
    whole = refine_states(model.model, narrow.float(), positions, latent)
    assert rounded.dtype == torch.bfloat16 and torch.equal(rounded, whole.bfloat16())


def test_a_state_of_zeros_stays_finite_forward_and_backward(make):
    model = with_aslr(make())
    tokens, latent = batch()
    states = torch.zeros(3, 4, 32, requires_grad=True)
    refined = refine_states(model.model, states, tokens["position_ids"], latent)
    assert refined.abs().max() < 1e-12
    refined.sum().backward()
    assert states.grad.isfinite().all() and all(p.grad.isfinite().all() for p in aslr_parameters(model))


def test_the_states_that_a_caller_asks_for_end_with_the_refined_one(make):
    model = with_aslr(make())
    tokens, latent = batch()
    with torch.no_grad():
        output = model.model(**tokens, **latent, output_hidden_states=True)
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert torch.equal(model.lm_head(output.last_hidden_state), logits_of(model))


def test_rows_without_a_seed_draw_one_from_torchs_generator(make):
    model = with_aslr(make())
    tokens, latent = batch()
    torch.manual_seed(5)
    drawn = logits_of(model, aslr_row_seeds=None)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    seeds = torch.randint(2**31, (3,))
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(logits_of(model, aslr_row_seeds=seeds), drawn)
    assert torch.equal(torch.get_rng_state(), after)
    logits_of(model, aslr_row_seeds=None, aslr_gumbel_temp=0.0)
    assert torch.equal(torch.get_rng_state(), after), "without noise there is nothing to draw"


# --- the start


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numbers", [{}, {"gumbel_temp": 5.0, "threshold": 0.0, "cross_path_lambda": 1.0}])
def test_at_the_start_the_logits_are_those_of_the_plain_model_bit_for_bit(make, dtype, numbers):
    plain = make(initializer_range=0.2).to(dtype)
    model = with_aslr(plain, random=False, **numbers)
    assert torch.equal(logits_of(model), logits_of(plain))
    _, trace, real = refined_with_trace(model)
    assert (trace[real][:, 0] == 0.5).all() and (trace[real][:, 1:] > 0).all()


def test_every_module_starts_where_the_docstring_says(make):
    for model in (make(**ON), with_aslr(make(), random=False)):
        router_w, router_b, in_w, in_b, out_w, out_b, share, proj_w, proj_b = aslr_parameters(model)
        assert not any(p.any() for p in (router_w, router_b, in_b, out_b, proj_w, proj_b))
        assert torch.equal(in_w, torch.eye(32).repeat(3, 1)) and torch.equal(out_w, torch.eye(32))
        assert torch.equal(share, torch.ones(4))
        assert {p.dtype for p in aslr_parameters(model)} == {torch.float32}


@pytest.mark.parametrize("how", ["P = 1", "R = 0", "inference"])
def test_without_a_loop_the_very_tensor_comes_back_and_nothing_is_drawn(make, how):
    plain = make()
    model = with_aslr(plain, **{"P = 1": {"num_paths": 1}, "R = 0": {"max_iterations": 0}}.get(how, {}))
    tokens, latent = batch()
    inputs = {**latent, "aslr_row_seeds": None, "is_m3po_inference": how == "inference"}
    states, rng = torch.randn(3, 4, 32), torch.get_rng_state()
    assert refine_states(model.model, states, tokens["position_ids"], dict(inputs)) is states
    assert torch.equal(logits_of(model, **inputs), logits_of(plain, **inputs))
    assert torch.equal(torch.get_rng_state(), rng)


def test_inference_skips_and_unset_runs_and_says_so_once(make):
    plain = make()
    model = with_aslr(plain)
    with heard() as messages:
        assert torch.equal(logits_of(model, is_m3po_inference=True), logits_of(plain))
        runs = logits_of(model)
        assert not torch.equal(runs, logits_of(plain)) and messages == []
        assert torch.equal(logits_of(model, is_m3po_inference=None), runs)
        tokens, latent = batch()
        model(**tokens, aslr_row_seeds=latent["aslr_row_seeds"])
        logits_of(plain, is_m3po_inference=None)
    assert len(messages) == 1 and "\n" not in messages[0]
    assert all(word in messages[0] for word in ("is_m3po_inference is not set", "ASLR runs", "True", "False"))


# --- what the latent paths do


def test_the_latent_paths_differ_and_collaboration_draws_them_together_at_the_start(make):
    _, trace, real = refined_with_trace(with_aslr(make(), random=False))
    _, before, after = trace[real].unbind(-1)
    # P = 4 equal draws of variance one: the mean of the variance over them is 3/4.
    assert abs(before.mean() / (0.1 * 0.75**0.5) - 1) < 0.05
    assert (after > 0.5 * before).all() and (after < 0.99 * before).all()
    _, trace, real = refined_with_trace(with_aslr(make(), random=False, cross_path_lambda=0.0))
    assert torch.equal(trace[real][:, 1], trace[real][:, 2])


def test_without_noise_the_latent_paths_are_equal(make):
    for random in (False, True):
        _, trace, real = refined_with_trace(with_aslr(make(), random=random, gumbel_temp=0.0))
        assert trace[real][:, 1:].abs().max() < 1e-6


def test_the_spread_is_the_distance_of_the_latent_paths_from_their_mean():
    paths = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]], [[2.0, 2.0], [2.0, 2.0]]])
    torch.testing.assert_close(path_spread(paths), torch.tensor([0.5**0.5, 0.0]))


# --- the numbers of one call


@pytest.mark.parametrize(
    "changed",
    [
        {"aslr_max_iterations": 3},
        {"aslr_threshold": 0.9},
        {"aslr_gumbel_temp": 0.0},
        {"aslr_cross_path_lambda": 0.8, "aslr_cross_path_temp": 2},
    ],
)
def test_a_forward_can_override_the_numbers_for_itself(make, changed):
    plain = make()
    model = with_aslr(plain)
    other = with_aslr(plain, **{name.removeprefix("aslr_"): value for name, value in changed.items()})
    before = logits_of(model, aslr_threshold=None, aslr_num_paths=None)
    assert torch.equal(logits_of(model, **changed), logits_of(other))
    assert not torch.equal(logits_of(other), before) and torch.equal(logits_of(model), before)
    assert {name: getattr(model.config, name) for name in DEFAULTS} == DEFAULTS


def test_the_number_of_latent_paths_is_that_which_was_built(make):
    model = with_aslr(make(), num_paths=3)
    assert torch.equal(logits_of(model, aslr_num_paths=3), logits_of(model))
    for paths in (1, 2, 4):
        with pytest.raises(ValueError, match=f"^aslr_num_paths={paths}: .* built for 3") as error:
            logits_of(model, aslr_num_paths=paths)
        assert "\n" not in str(error.value) and "aslr_max_iterations=0" in str(error.value)


def test_a_number_that_a_forward_cannot_use_is_refused(make):
    model, plain = with_aslr(make()), make()
    for name, value in [("aslr_threshold", 1.5), ("aslr_cross_path_temp", 0), ("aslr_max_iterations", 1.0)]:
        with pytest.raises(ValueError, match=f"^{name}={value} "):
            logits_of(model, **{name: value})
    for name, value in DEFAULTS.items():
        with pytest.raises(ValueError, match=f"^{name} does nothing on a model without ASLR: .*aslr_enabled=True"):
            logits_of(plain, **{name: value})
    for shut in (True, False, None):
        assert torch.equal(logits_of(plain, is_m3po_inference=shut), logits_of(plain))


def test_an_aggregator_refuses_another_number_of_latent_paths(make):
    with pytest.raises(ValueError, match="^aslr_num_paths=3: this path aggregator was built for 4.$"):
        make(**ON).model.m3po_path_aggregator(torch.zeros(2, 3, 32))


# --- the configuration


@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config])
def test_the_defaults_are_those_of_seed_2(config):
    assert config().aslr_enabled is False
    for made in (config(), config(**ON)):
        assert {name: getattr(made, name) for name in DEFAULTS} == DEFAULTS


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        *[("aslr_num_paths", value, "is no whole number from 1 on") for value in (0, -1)],
        ("aslr_max_iterations", -1, "is no whole number from 0 on"),
        *[("aslr_threshold", value, r"is outside \[0, 1\]") for value in (-0.1, 1.1, NAN, INF)],
        *[("aslr_gumbel_temp", value, "is not 0 or a positive number") for value in (-0.1, NAN, INF)],
        *[("aslr_cross_path_lambda", value, r"is outside \[0, 1\]") for value in (-0.1, 1.1, NAN, INF)],
        *[("aslr_cross_path_temp", value, "is not above 0") for value in (0, 0.0, -1.0, NAN, INF)],
    ],
)
@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config])
def test_numbers_that_aslr_cannot_run_with_are_refused_in_one_line(tiny_llama, config, name, value, rule):
    line = f"^{name}={value} {rule}; seed 2 uses {DEFAULTS[name]}.$"
    for given in ({**ON, name: value}, {name: value}):
        with pytest.raises(Exception, match=name) as error:
            config(**given)
        cause = error.value.__cause__ or error.value
        assert isinstance(cause, ValueError)
        with pytest.raises(ValueError, match=line):
            raise cause
    with pytest.raises(ValueError, match=line):
        attach_aslr(tiny_llama(), **{name: value})


@pytest.mark.parametrize(("name", "value"), [("aslr_num_paths", 2.0), ("aslr_max_iterations", 1.5)])
@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config])
def test_numbers_of_paths_and_rounds_are_whole(tiny_llama, config, name, value):
    with pytest.raises(Exception, match=name):
        config(**ON, **{name: value})
    with pytest.raises(ValueError, match=f"^{name}={value} is no whole number"):
        attach_aslr(tiny_llama(), **{name: value})


def test_eight_heads_must_divide_the_hidden_size(make):
    odd = {"hidden_size": 36, "num_attention_heads": 2, "num_key_value_heads": 1}
    assert make(**odd).config.aslr_enabled is False
    for refused in (lambda: make(**odd, **ON), lambda: attach_aslr(make(**odd))):
        with pytest.raises(Exception, match="8 heads") as error:
            refused()
        cause = error.value.__cause__ or error.value
        assert isinstance(cause, ValueError) and "\n" not in str(cause)
        assert all(word in str(cause) for word in ("aslr_enabled=True", "this model has 36", "aslr_enabled=False"))


def test_a_refused_attachment_leaves_the_model_as_it_was(make):
    model = make()
    with pytest.raises(ValueError):
        attach_aslr(model, aslr_num_paths=0)
    assert model.config.aslr_enabled is False and model.config.aslr_num_paths == 4
    assert not any("m3po" in name for name in model.state_dict())


def test_on_is_saved_loaded_and_can_be_overridden(make, tmp_path):
    numbers = {"aslr_num_paths": 3, "aslr_threshold": 0.25, "aslr_gumbel_temp": 2.0, "aslr_cross_path_lambda": 1}
    model = make(**ON, **numbers)
    assert {key for key in model.state_dict() if "m3po" in key} == NAMES
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored.items() >= (ON | DEFAULTS | numbers).items()
    read = AutoConfig.from_pretrained(tmp_path)
    assert {name: getattr(read, name) for name in DEFAULTS} == DEFAULTS | numbers
    other = AutoModelForCausalLM.from_pretrained(tmp_path, aslr_threshold=0.75, aslr_max_iterations=0)
    assert (other.config.aslr_threshold, other.config.aslr_max_iterations, other.config.aslr_num_paths) == (0.75, 0, 3)


def test_off_leaves_no_trace_in_the_configuration_and_the_weights(make, tmp_path):
    model = make(aslr_threshold=0.3)
    assert not any("aslr" in key for key in (*model.config.to_dict(), *model.config.to_diff_dict()))
    assert not any("m3po" in key for key in model.state_dict())
    model.save_pretrained(tmp_path)
    assert "aslr" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("saved_once", [False, True])
def test_no_number_is_copied_into_the_generation_config(make, tmp_path, saved_once):
    """There it would win over the model's configuration ever after."""
    model = make(**ON, aslr_threshold=0.3)
    if saved_once:
        model.save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.generate(torch.tensor([[5, 6]]), max_new_tokens=1, do_sample=False, is_m3po_inference=False)
    model.save_pretrained(tmp_path)
    assert not {key for key in model.generation_config.to_dict() if "aslr" in key}
    text = (tmp_path / "generation_config.json").read_text()
    assert "aslr" not in text and "m3po" not in text


def test_the_generation_config_saves_inference_when_it_is_set(tmp_path):
    assert GenerationConfig().is_m3po_inference is None
    for value in (True, False):
        GenerationConfig(is_m3po_inference=value).save_pretrained(tmp_path)
        assert GenerationConfig.from_pretrained(tmp_path).is_m3po_inference is value


@pytest.mark.parametrize("kind", ["mistral", "gemma", "qwen3", "olmo", "granite", "cohere", "phi3", "qwen2_moe"])
def test_configurations_that_upstream_generates_from_these_have_no_such_fields(kind):
    config = AutoConfig.for_model(kind)
    assert not any(name.startswith("aslr") for name in (*vars(config), *dir(type(config)), *config.to_dict()))


# --- the gradient


def policy_loss(model, **inputs):
    """The loss of a policy pass, whose last logits predict nothing."""
    tokens, latent = batch()
    logits = model(**tokens, **latent, **inputs).logits[:, :-1]
    pull = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    return (logits * pull * tokens["attention_mask"][:, :-1, None]).sum()


def gradients(model, loss):
    """The gradients of the nine parameters, by name."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in zip(ASLR_PARAMETERS, aslr_parameters(model), strict=True)}


def alive(found):
    """The names whose gradient is not zero; none may be missing."""
    assert all(grad is not None and grad.isfinite().all() for grad in found.values())
    return {name for name, grad in found.items() if grad.any()}


PROJECTION = {"m3po_path_aggregator.weight_proj.weight", "m3po_path_aggregator.weight_proj.bias"}


def test_at_the_start_the_projection_gets_gradient_and_from_then_on_every_module(make):
    model = with_aslr(make(), random=False)
    optimizer = torch.optim.AdamW(aslr_parameters(model), lr=1e-2)
    for expected in (PROJECTION, set(ASLR_PARAMETERS)):
        assert alive(gradients(model, policy_loss(model))) == expected
        optimizer.step()


@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_every_module_gets_gradient_from_every_position(make, position):
    model = with_aslr(make())
    tokens, latent = batch((4, 4, 4))
    loss = model(**tokens, **latent).logits[:, position].square().sum()
    assert alive(gradients(model, loss)) == set(ASLR_PARAMETERS)


def last_position_only(model, states, position_ids, inputs):
    """Seed 2's version: the state that the next token is sampled from, and no other."""
    last = refine_states(model, states[:, -1:], position_ids[:, -1:], inputs)
    return torch.cat([states[:, :-1], last], dim=1)


def test_refining_the_last_position_alone_gets_no_gradient_from_a_policy_pass(make, monkeypatch):
    """Erratum E8: what the test above guards against, put in on purpose."""
    model = with_aslr(make())
    monkeypatch.setattr(product, "refine_states", last_position_only)
    assert alive(gradients(model, policy_loss(model))) == set()


def test_the_gradient_is_that_of_finite_differences_of_the_reference(make):
    """A few entries of each parameter, and of the states."""
    model = with_aslr(make(), cross_path_lambda=0.4, cross_path_temp=1.0)
    tokens, latent = batch((2, 1))
    g = torch.Generator().manual_seed(3)
    states = torch.randn(2, 2, 32, generator=g).requires_grad_()
    mask = tokens["attention_mask"]
    pull = torch.randn(2, 2, 32, generator=g) * mask[..., None]
    loss = (refine_states(model.model, states, tokens["position_ids"], latent) * pull).sum()
    found = gradients(model, loss)
    seeds, indices = latent["aslr_row_seeds"].tolist(), token_indices(mask)
    modules, numbers, start = reference_modules(model), reference_numbers(model), states.detach().double().numpy()

    def loss_at(states, modules):
        return float((aslr.refine(states, seeds, indices, modules, numbers).states * pull.double().numpy()).sum())

    def slope(values, place, at, h=1e-5):
        ends = []
        for step in (h, -h):
            moved = values.copy()
            moved[place] += step
            ends.append(at(moved))
        return (ends[0] - ends[1]) / (2 * h)

    for name, field, grad in zip(ASLR_PARAMETERS, aslr.Modules._fields, found.values(), strict=True):
        # The entries of the largest gradient say the most; the first and the last are where a slice goes wrong.
        flat = grad.abs().flatten()
        for k in {0, flat.numel() - 1, int(flat.argmax())}:
            place = np.unravel_index(k, grad.shape)
            values = getattr(modules, field)
            expected = slope(
                values, place, lambda moved, field=field: loss_at(start, modules._replace(**{field: moved}))
            )
            assert grad[place].item() == pytest.approx(expected, rel=1e-4, abs=1e-5 * max(1, float(flat.max()))), name
    for place in [(0, 0, 3), (0, 1, 31), (1, 1, 0)]:
        expected = slope(start, place, lambda moved: loss_at(moved, modules))
        assert states.grad[place].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(make, monkeypatch, seeded, reentrant):
    model, calls = with_aslr(make()).train(), []
    model.enable_input_require_grads()
    monkeypatch.setattr(product, "latent_noise", lambda *args: (calls.append(1), latent_noise(*args))[1])
    found = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(3)
        tokens, latent = batch()
        logits = model(**tokens, **(latent if seeded else {"is_m3po_inference": False}), use_cache=False).logits
        loss = logits[:, :-1].square().sum()
        model.zero_grad(set_to_none=True)
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert len(calls) == 2 + 4, "a round each, and once more in the backward pass"
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-6, rtol=1e-5)


# --- compilation and caches


def test_the_model_compiles_in_one_graph_with_its_noise(make):
    model = with_aslr(make())
    expected = logits_of(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    tokens, latent = batch()
    with torch.no_grad():
        got = compiled(**tokens, aslr_row_seeds=latent["aslr_row_seeds"])  # unset: nothing is logged in a graph
    torch.testing.assert_close(got.logits, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_the_noise_is_the_same_through_inductor():
    """Its whole numbers must not be narrowed, nor its products overflow."""
    where = (torch.tensor([1, 2**31 - 1, 0]), torch.arange(12).view(3, 4), 4, 1, 32)
    compiled = torch.compile(latent_noise, fullgraph=True)(*where)
    torch.testing.assert_close(compiled, latent_noise(*where), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("steps", [[4], [2, 1, 1], [1, 3]])
def test_a_cache_of_either_kind_gives_the_logits_of_one_forward(make, steps):
    model = with_aslr(make(initializer_range=0.2))
    tokens, latent = batch()
    whole, real = logits_of(model), tokens["attention_mask"].bool()
    for cache in (None, StaticCache(config=model.config, max_cache_len=8)):
        parts, start = [], 0
        for width in steps:
            now = slice(start, start + width)
            with torch.no_grad():
                output = model(
                    tokens["input_ids"][:, now],
                    attention_mask=tokens["attention_mask"][:, : now.stop],
                    position_ids=tokens["position_ids"][:, now],
                    past_key_values=cache,
                    use_cache=True,
                    **latent,
                )
            parts.append(output.logits)
            cache, start = output.past_key_values, now.stop
        torch.testing.assert_close(torch.cat(parts, dim=1)[real], whole[real], atol=CLOSE, rtol=CLOSE)


# --- loading and saving


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_modules_come_back_bit_for_bit(make, tmp_path, dtype):
    """In float32 whatever the model's dtype: a rounded unit matrix would be no start any more."""
    model = with_aslr(make().to(dtype), cross_path_lambda=0.4)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() >= NAMES
    for asked in (dtype, "auto"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=asked)
        assert {p.dtype for p in aslr_parameters(again)} == {torch.float32} and again.lm_head.weight.dtype == dtype
        assert all(torch.equal(a, b) for a, b in zip(aslr_parameters(again), aslr_parameters(model), strict=True))
        assert_computes_the_same(logits_of(again), logits_of(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_checkpoint_loads_into_a_model_with_the_modules_at_their_start(make, tmp_path, dtype):
    make(initializer_range=0.2).to(dtype).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=dtype, output_loading_info=True, **ON, aslr_num_paths=3
    )
    assert set(info["missing_keys"]) - {"lm_head.weight"} == NAMES
    fresh = with_aslr(plain, random=False, num_paths=3)
    assert {p.dtype for p in aslr_parameters(model)} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(aslr_parameters(model), aslr_parameters(fresh), strict=True))
    assert {p.dtype for name, p in model.named_parameters() if name not in NAMES} == {dtype}
    assert torch.equal(logits_of(model), logits_of(plain))
    assert all(p.requires_grad and not p.is_meta for p in aslr_parameters(model))


def test_a_base_model_without_its_head_loads_the_modules_too(make, tmp_path):
    model = with_aslr(make())
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(aslr_parameters(base), aslr_parameters(model), strict=True))
    base.save_pretrained(tmp_path / "base")
    assert set(ASLR_PARAMETERS) <= load_file(tmp_path / "base" / "model.safetensors").keys()


def rewrite(folder, change):
    """Changes the tensors of a checkpoint."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("missing", sorted(NAMES))
def test_modules_that_lack_a_tensor_are_refused_and_can_be_left_out(tiny_llama, tmp_path, missing):
    plain = tiny_llama()
    with_aslr(plain).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda weights: weights.pop(missing))
    with pytest.raises(ValueError, match="would be random") as error:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    words = (str(tmp_path), missing, "aslr_enabled=True", "aslr_enabled=False")
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)
    off = AutoModelForCausalLM.from_pretrained(tmp_path, aslr_enabled=False)
    assert_computes_the_same(logits_of(off), logits_of(plain))


@pytest.mark.parametrize("name", ["model.m3po_path_aggregator.weight", "model.m3po_router.gate.weight"])
def test_modules_of_another_shape_are_refused_even_where_sizes_may_differ(make, tmp_path, name):
    with_aslr(make()).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda weights: weights.update({name: torch.zeros(5)}))
    with pytest.raises(ValueError, match=f"no {name} of the right shape"):
        AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_another_number_of_latent_paths_than_the_checkpoint_has_is_refused(make, tmp_path):
    with_aslr(make(), num_paths=3).save_pretrained(tmp_path)
    with pytest.raises((ValueError, RuntimeError)):
        AutoModelForCausalLM.from_pretrained(tmp_path, aslr_num_paths=4)
    with pytest.raises(ValueError, match="m3po_path_aggregator.weight of the right shape"):
        AutoModelForCausalLM.from_pretrained(tmp_path, aslr_num_paths=4, ignore_mismatched_sizes=True)


def test_modules_can_be_dropped_on_purpose(make, tmp_path):
    plain = make()
    with_aslr(plain).save_pretrained(tmp_path)
    off = AutoModelForCausalLM.from_pretrained(tmp_path, aslr_enabled=False)
    assert not any("m3po" in name for name in off.state_dict()) and not off.config.aslr_enabled
    assert_computes_the_same(logits_of(off), logits_of(plain))
    off.save_pretrained(tmp_path / "off")
    assert "aslr" not in (tmp_path / "off" / "config.json").read_text()


@pytest.mark.parametrize("field", [None, False])
def test_modules_that_the_configuration_does_not_know_of_are_not_dropped_unasked(make, tmp_path, field):
    model = with_aslr(make())
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["aslr_enabled"]
    (tmp_path / "config.json").write_text(json.dumps(stored if field is None else stored | {"aslr_enabled": field}))
    for given in ({}, {"aslr_enabled": False}):
        with pytest.raises(ValueError, match="would be lost") as error:
            AutoModelForCausalLM.from_pretrained(tmp_path, **given)
        assert "\n" not in str(error.value) and "aslr_enabled=True" in str(error.value)
        assert min(NAMES) in str(error.value)
    assert_computes_the_same(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path, **ON)), logits_of(model))


# --- attach, copy, pickle


def test_attaching_changes_no_logits_and_leaves_torchs_generator_be(make):
    model = make()
    before, state = logits_of(model), torch.get_rng_state()
    attach_aslr(model, aslr_num_paths=2, aslr_threshold=0.25)
    assert torch.equal(torch.get_rng_state(), state)
    numbers = {name: getattr(model.config, name) for name in DEFAULTS}
    assert numbers == DEFAULTS | {"aslr_num_paths": 2, "aslr_threshold": 0.25} and model.config.aslr_enabled
    assert model.model.m3po_path_aggregator.weight.shape == (2,)
    assert torch.equal(logits_of(model), before)


def test_attaching_keeps_the_numbers_of_the_configuration(make):
    model = make(aslr_num_paths=2, aslr_gumbel_temp=3.0)
    attach_aslr(model.model, aslr_threshold=0.25)
    numbers = {"aslr_num_paths": 2, "aslr_gumbel_temp": 3.0, "aslr_threshold": 0.25}
    assert {name: getattr(model.config, name) for name in DEFAULTS} == DEFAULTS | numbers


def test_copying_the_modules_makes_them_the_same_and_things_of_their_own(make):
    plain = make()
    source, target = with_aslr(plain), with_aslr(plain, random=False)
    assert not torch.equal(logits_of(source), logits_of(target))
    ASLR.copy(source, target)
    after = logits_of(target)
    assert torch.equal(after, logits_of(source))
    randomise(source, seed=1)
    assert torch.equal(logits_of(target), after) and not torch.equal(logits_of(source), after)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_model_with_the_modules_can_be_copied_and_pickled(make, way):
    model = with_aslr(make())
    before = logits_of(model)
    twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(logits_of(twin), before)
    randomise(twin)
    assert not torch.equal(logits_of(twin), before) and torch.equal(logits_of(model), before)


@pytest.mark.parametrize("home", [m3po, modeling_llama, modeling_qwen2])
def test_the_classes_of_seed_2_can_be_imported_from_the_model_files(home, tiny_llama):
    classes = [home.M3PORouter, home.M3POPathCollaborator, home.M3POPathAggregator]
    base = tiny_llama(**ON).model
    assert [type(getattr(base, name)) for name in ASLR_MODULES] == classes
    states = torch.randn(2, 4, 32)
    assert torch.equal(base.m3po_router(states), torch.full((2, 4, 1), 0.5))
    assert base.m3po_path_collaborator(states, 0.1).shape == (2, 4, 32)
    assert torch.equal(base.m3po_path_aggregator(states), torch.zeros(2, 32))


def test_a_quantised_layer_is_refused(make):
    model = with_aslr(make())
    gate = model.model.m3po_router.gate
    gate.weight = torch.nn.Parameter(gate.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="was quantised to torch.int8: load the plain model quantised"):
        model(torch.ones(1, 3, dtype=torch.long), is_m3po_inference=False)


@pytest.mark.parametrize("on", [True, False])
def test_a_checkpoint_in_a_subfolder_is_judged_by_its_own_configuration(make, tmp_path, on):
    model = with_aslr(make())
    model.save_pretrained(tmp_path / "deep")
    loaded = type(model).from_pretrained(tmp_path, subfolder="deep", **({} if on else {"aslr_enabled": False}))
    assert hasattr(loaded.model, "m3po_router") == on


def test_a_state_dict_without_a_checkpoint_is_not_looked_for_elsewhere(make):
    model = make()
    config = copy.deepcopy(model.config)
    config.aslr_enabled = True
    loaded = type(model).from_pretrained(None, config=config, state_dict=model.state_dict())
    assert torch.equal(loaded.model.m3po_path_aggregator.weight_proj.weight, torch.zeros(32, 32))
