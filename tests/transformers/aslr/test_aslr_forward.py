# SPDX-License-Identifier: Apache-2.0
"""A forward with ASLR: its formula, start and spread, overrides for one call, compilation and caches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import aslr
from reference.latent import (
    CLOSE,
    DEFAULTS,
    ON,
    aslr_parameters,
    batch,
    logged_warnings,
    logits_of,
    reference_modules,
    reference_numbers,
    refined_with_trace,
    token_indices,
    with_aslr,
)
from transformers import StaticCache
from transformers.m3po.aslr.modules import ASLR_PARAMETERS, path_spread, refine_states

pytestmark = pytest.mark.usefixtures("one_thread")


def states_and_reference(plain, model, **overrides):
    """last_hidden_state of a plain model, and what the reference makes of it with the modules of `model`."""
    tokens, latent = batch()
    with torch.no_grad():
        states = plain.model(**tokens).last_hidden_state
    indices = token_indices(tokens["attention_mask"])
    numbers = reference_numbers(model, **overrides)
    seeds = latent["aslr_row_seeds"].tolist()
    return states, aslr.refine(states.double().numpy(), seeds, indices, reference_modules(model), numbers)


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


@pytest.mark.all_families
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


@pytest.mark.all_families
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


@pytest.mark.all_families
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
@pytest.mark.all_families
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
    with logged_warnings() as messages:
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


@pytest.mark.all_families
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


@pytest.mark.all_families
def test_the_model_compiles_in_one_graph_with_its_noise(make):
    model = with_aslr(make())
    expected = logits_of(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    tokens, latent = batch()
    with torch.no_grad():
        got = compiled(**tokens, aslr_row_seeds=latent["aslr_row_seeds"])  # unset: nothing is logged in a graph
    torch.testing.assert_close(got.logits, expected, atol=1e-6, rtol=1e-6)


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
