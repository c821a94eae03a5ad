# SPDX-License-Identifier: Apache-2.0
"""`generate` on a model with ASLR: a rollout is what one teacher-forced pass scores, in every mode."""

from __future__ import annotations

import pytest
import torch
from reference.aslr_rollouts import (
    EOS,
    GROUPS,
    LEFT_OUT,
    LENGTHS,
    MODES,
    STATISTICS,
    TEMPERATURE,
    assert_agrees,
    completions_of,
    rollout,
    scored,
)
from reference.latent import CLOSE, logged_warnings, positions_of, with_aslr
from reference.tiny import alive_before, left_padded
from transformers import StaticCache
from transformers.m3po import M3POGenerateOutput, M3POGenerationState

pytestmark = pytest.mark.usefixtures("one_thread")


# --- rollout and scoring pass


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("how", ["sampled", "greedy"])
@pytest.mark.all_families
def test_a_rollout_has_the_log_probs_of_one_teacher_forced_pass(make_for_mode, mode, how):
    model = with_aslr(make_for_mode(mode))
    greedy = {"do_sample": False, "temperature": None, "top_k": None}
    output = rollout(model, mode, **(greedy if how == "greedy" else {}))
    tokens = completions_of(output)
    ends = alive_before(tokens, EOS).sum(1)
    assert ends.min() < ends.max() == 8 or how == "greedy", "a poor case"
    assert (output.bag_ids is None) == (mode == "none")
    temperature = TEMPERATURE if how == "sampled" else 1.0
    assert_agrees(model, output, temperature=temperature)
    for wrong in (
        {"is_m3po_inference": True},
        {"aslr_row_seeds": output.row_seeds + 1},
        {"aslr_row_seeds": output.row_seeds.flip(0)},
        {"aslr_threshold": 0.6},
    ):
        other = scored(model, output, temperature=temperature, **wrong)
        assert (other - output.rollout_logps).abs().max() > 1e-2, f"{wrong}: the test cannot tell"


@pytest.mark.parametrize(
    "numbers",
    [
        {"num_paths": 2, "max_iterations": 3, "cross_path_lambda": 0.9},
        {"gumbel_temp": 0.0},
        {"threshold": 0.0, "cross_path_temp": 2.0},
    ],
)
def test_other_numbers_agree_as_well(make_for_mode, numbers):
    model = with_aslr(make_for_mode(), **numbers)
    assert_agrees(model, rollout(model))


@pytest.mark.parametrize("mode", list(MODES))
def test_the_paths_of_a_prompt_have_seeds_of_their_own_and_agree(make_for_mode, mode):
    model, mask = with_aslr(make_for_mode(mode)), left_padded([3, 5])["attention_mask"]
    prompts = left_padded([3, 5], first=3, last=28)
    output = rollout(model, mode, **prompts, num_return_sequences=3)
    assert output.row_seeds.shape == (6,) and output.row_seeds.unique().numel() == 6
    assert_agrees(model, output, mask=mask)
    greedy = rollout(model, **prompts, num_return_sequences=3, m3po=M3POGenerationState()) if mode == "none" else None
    assert greedy is None or greedy.rollout_logps[:3, 0].unique().numel() > 1


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("cache", ["static", "given", "none", "chunks", "chunks of one"])
def test_every_cache_and_every_prefill_gives_the_same_rollout(make_for_mode, mode, cache):
    model = with_aslr(make_for_mode(mode))
    arguments = {
        "static": {"cache_implementation": "static"},
        "given": {"past_key_values": StaticCache(config=model.config, max_cache_len=64)},
        "none": {"use_cache": False},
        "chunks": {"prefill_chunk_size": 4},
        "chunks of one": {"prefill_chunk_size": 1},
    }[cache]
    expected, output = rollout(model, mode), rollout(model, mode, **arguments)
    assert torch.equal(output.sequences, expected.sequences) and torch.equal(output.row_seeds, expected.row_seeds)
    torch.testing.assert_close(output.rollout_logps, expected.rollout_logps, atol=CLOSE, rtol=CLOSE)
    assert STATISTICS <= output.statistics.keys() == expected.statistics.keys()
    for name, value in expected.statistics.items():
        torch.testing.assert_close(output.statistics[name], value, atol=CLOSE, rtol=CLOSE)


def test_the_model_may_be_in_bfloat16(make_for_mode):
    model = with_aslr(make_for_mode(initializer_range=0.05).to(torch.bfloat16))
    assert_agrees(model, rollout(model), tolerance=0.1)


def test_a_prompt_padded_further_gives_the_same_rollout(make_for_mode):
    model = with_aslr(make_for_mode())
    prompts = left_padded(LENGTHS, first=3, last=28)
    wider = {name: torch.nn.functional.pad(value, (3, 0)) for name, value in prompts.items()}
    one, other = rollout(model, **prompts), rollout(model, **wider)
    assert torch.equal(one.sequences, other.sequences[:, 3:])
    torch.testing.assert_close(one.rollout_logps, other.rollout_logps, atol=CLOSE, rtol=CLOSE)


def test_at_the_start_a_rollout_is_that_of_the_plain_model(make_for_mode):
    """But for the seeds, which are drawn from the same generator before the first token."""
    plain = make_for_mode()
    model, state = with_aslr(plain, random=False), M3POGenerationState(row_seeds=torch.arange(6))
    one, other = rollout(model, m3po=state), rollout(plain)
    assert torch.equal(one.sequences, other.sequences)
    assert (one.statistics["router_weight_mean"], one.statistics["activation_rate_actual"]) == (0.5, 0.0)


# --- the seeds of the rows


@pytest.mark.parametrize("mode", list(MODES))
def test_given_seeds_are_used_and_reported(make_for_mode, mode):
    model, seeds = with_aslr(make_for_mode(mode)), torch.tensor([5, 2**31 - 1, 0, 7, 7, 1])
    groups = {"group_ids": torch.tensor(GROUPS)} if "enable_cross_path" in MODES[mode] else {}
    state = M3POGenerationState(row_seeds=seeds, **groups)
    output = rollout(model, mode, m3po=state)
    assert torch.equal(output.row_seeds, seeds) and torch.equal(state.row_seeds, seeds)
    assert_agrees(model, output)
    again = rollout(model, mode, m3po=M3POGenerationState(row_seeds=seeds.int(), **groups))
    assert torch.equal(again.sequences, output.sequences) and torch.equal(again.rollout_logps, output.rollout_logps)
    assert again.row_seeds.dtype == torch.long


def test_drawn_seeds_come_from_torchs_generator_and_are_recorded(make_for_mode):
    model, state = with_aslr(make_for_mode()), M3POGenerationState()
    output = rollout(model, seed=5, m3po=state)
    rng = torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(output.row_seeds, torch.randint(2**31, (6,))) and torch.equal(state.row_seeds, output.row_seeds)
    again = rollout(model, seed=5)
    assert torch.equal(again.sequences, output.sequences) and torch.equal(again.rollout_logps, output.rollout_logps)
    assert torch.equal(again.row_seeds, output.row_seeds) and torch.equal(torch.get_rng_state(), rng)
    assert not torch.equal(rollout(model, seed=6).row_seeds, output.row_seeds)
    rollout(model, **left_padded([3, 6], first=3, last=28), max_new_tokens=2, m3po=state)
    assert state.row_seeds.shape == (2,), "a state that is used again draws again"


def test_the_seeds_alone_tell_greedy_rollouts_apart(make_for_mode):
    model, logps = with_aslr(make_for_mode()), []
    for seeds in (torch.arange(6), torch.arange(6), torch.arange(6) + 1):
        state = M3POGenerationState(row_seeds=seeds)
        logps.append(rollout(model, do_sample=False, temperature=None, top_k=None, m3po=state).rollout_logps[:, 0])
    assert torch.equal(logps[0], logps[1]) and not torch.equal(logps[0], logps[2])


@pytest.mark.parametrize("count", [1, 5, 7])
def test_there_is_a_seed_for_each_row_or_an_error(make_for_mode, count):
    model = with_aslr(make_for_mode())
    with pytest.raises(ValueError, match=rf"^aslr_row_seeds of shape \({count},\) .* for 6 rows: give a 1-D tensor"):
        rollout(model, m3po=M3POGenerationState(row_seeds=torch.arange(count)))
    with pytest.raises(ValueError, match=rf"^aslr_row_seeds of shape \({count},\) .* for 12 rows"):
        rollout(model, num_return_sequences=2, m3po=M3POGenerationState(row_seeds=torch.arange(count)))


# --- inference, and overrides of a call


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("way", ["argument", "generation config"])
@pytest.mark.all_families
def test_at_inference_a_rollout_is_that_of_the_plain_model_bit_for_bit(make_for_mode, mode, way):
    plain = make_for_mode(mode)
    model, random_states, outputs = with_aslr(plain), [], []
    for net in (plain, model):
        if way == "argument":
            arguments = {"is_m3po_inference": True}
        else:
            net.generation_config.is_m3po_inference = True
            arguments = {"is_m3po_inference": LEFT_OUT}
        outputs.append(rollout(net, mode, output_logits=True, **arguments))
        random_states.append(torch.get_rng_state())
    one, other = outputs
    assert torch.equal(one.sequences, other.sequences) and torch.equal(*random_states)
    assert all(torch.equal(a, b) for a, b in zip(one.logits, other.logits, strict=True))
    assert type(one) is type(other) and getattr(other, "row_seeds", None) is None
    if mode != "none":
        assert torch.equal(one.rollout_logps, other.rollout_logps)
        assert one.statistics.keys() == other.statistics.keys() and not STATISTICS & other.statistics.keys()
    assert not torch.equal(rollout(model, mode, is_m3po_inference=False).sequences, one.sequences)


def test_a_state_at_inference_records_neither_seeds_nor_statistics(make_for_mode):
    state = M3POGenerationState(row_seeds=torch.arange(6))
    output = rollout(with_aslr(make_for_mode()), m3po=state, is_m3po_inference=True)
    assert state.row_seeds is None and state.statistics == {} and type(output) is not M3POGenerateOutput


def test_unset_runs_and_says_so_once(make_for_mode):
    model = with_aslr(make_for_mode())
    with logged_warnings() as messages:
        silent = rollout(model)
        rollout(model, is_m3po_inference=True)
        rollout(make_for_mode(), is_m3po_inference=None)
        assert messages == []
        unset = rollout(model, is_m3po_inference=None)
        rollout(model, is_m3po_inference=None)
    assert torch.equal(unset.sequences, silent.sequences) and torch.equal(unset.row_seeds, silent.row_seeds)
    assert len(messages) == 1 and "is_m3po_inference is not set" in messages[0] and "\n" not in messages[0]


@pytest.mark.parametrize("way", ["argument", "state"])
@pytest.mark.parametrize(
    "changed",
    [
        {"aslr_max_iterations": 4},
        {"aslr_threshold": 1.0, "aslr_gumbel_temp": 3.0},
        {"aslr_cross_path_lambda": 0.9, "aslr_cross_path_temp": 1},
    ],
)
def test_an_override_holds_for_its_call_only(make_for_mode, way, changed):
    plain = make_for_mode()
    model = with_aslr(plain)
    other = with_aslr(plain, **{name.removeprefix("aslr_"): value for name, value in changed.items()})
    before = rollout(model)
    given = changed if way == "argument" else {"m3po": M3POGenerationState(aslr_overrides=changed)}
    output, expected = rollout(model, **given), rollout(other)
    for name in ("sequences", "rollout_logps", "row_seeds"):
        assert torch.equal(getattr(output, name), getattr(expected, name)), name
    assert output.statistics == expected.statistics
    assert not torch.equal(output.rollout_logps[:, :1], before.rollout_logps[:, :1])
    assert_agrees(model, output, **changed)
    again = rollout(model)
    assert torch.equal(again.sequences, before.sequences) and torch.equal(again.rollout_logps, before.rollout_logps)
    assert not any(hasattr(model.generation_config, name) for name in changed)


@pytest.mark.parametrize("mode", list(MODES))
def test_an_override_goes_with_every_mode(make_for_mode, mode):
    model, prompts = with_aslr(make_for_mode(mode)), left_padded([3, 5], first=3, last=28)
    output = rollout(model, mode, **prompts, num_return_sequences=3, aslr_gumbel_temp=4.0)
    assert_agrees(model, output, mask=prompts["attention_mask"], aslr_gumbel_temp=4.0)
    spread = output.statistics["latent_diversity_before"]
    assert abs(spread / (0.4 * 0.75**0.5) - 1) < 0.1


def test_without_rounds_a_greedy_rollout_is_that_of_the_plain_model(make_for_mode):
    plain = make_for_mode()
    greedy = {"do_sample": False, "temperature": None, "top_k": None, "output_logits": True}
    expected, model = rollout(plain, **greedy), with_aslr(plain)
    for output in (rollout(model, aslr_max_iterations=0, **greedy), rollout(with_aslr(plain, num_paths=1), **greedy)):
        assert torch.equal(output.sequences, expected.sequences) and output.statistics == {}
        assert all(torch.equal(a, b) for a, b in zip(output.logits, expected.logits, strict=True))
    assert not torch.equal(rollout(model, **greedy).sequences, expected.sequences)


@pytest.mark.parametrize("how", ["P = 1", "R = 0", "R = 0 for the call"])
def test_without_a_loop_nothing_is_drawn_and_samples_are_those_of_the_plain_model(make_for_mode, how):
    plain = make_for_mode()
    expected = rollout(plain)
    rng = torch.get_rng_state()
    model = with_aslr(plain, **{"P = 1": {"num_paths": 1}, "R = 0": {"max_iterations": 0}}.get(how, {}))
    output = rollout(model, **({"aslr_max_iterations": 0} if how == "R = 0 for the call" else {}))
    assert torch.equal(output.sequences, expected.sequences) and torch.equal(torch.get_rng_state(), rng)


def test_nothing_is_drawn_and_recorded_on_a_model_without_aslr(make_for_mode):
    model = with_aslr(make_for_mode(), random=False)
    model.config.aslr_enabled = False
    state = M3POGenerationState()
    output, rng = rollout(model, m3po=state), torch.get_rng_state()
    assert torch.equal(output.sequences, rollout(make_for_mode()).sequences) and torch.equal(torch.get_rng_state(), rng)
    assert state.row_seeds is None and state.statistics == {}


# --- what comes back


@pytest.mark.parametrize("mode", list(MODES))
def test_the_statistics_are_the_means_over_the_sampled_tokens(make_for_mode, mode):
    """Measured again in one teacher-forced pass, at the states that the completion's tokens were sampled from."""
    model = with_aslr(make_for_mode(mode), threshold=0.7)
    output = rollout(model, mode, seed=2)
    tokens = completions_of(output)
    steps, sampled = tokens.shape[1], alive_before(tokens, EOS)
    assert not sampled.all(), "a poor case"
    trace = torch.zeros(*output.sequences.shape, 3)
    scored(model, output, aslr_trace=trace)
    score, before, after = trace[:, -steps - 1 : -1].double()[sampled].unbind(-1)
    assert 0.0 < (score > 0.7).double().mean() < 1.0 and not torch.allclose(before, after, rtol=1e-2), "a poor case"
    expected = {
        "router_weight_mean": score.mean(),
        "activation_rate_actual": (score > 0.7).double().mean(),
        "latent_diversity_before": before.mean(),
        "latent_diversity_after": after.mean(),
    }
    assert expected.keys() == STATISTICS and output.statistics.keys() >= STATISTICS
    for name, value in expected.items():
        assert output.statistics[name].shape == () and output.statistics[name].dtype == torch.float32
        torch.testing.assert_close(output.statistics[name].double(), value, atol=CLOSE, rtol=0)


def test_the_threshold_of_the_call_decides_which_positions_are_active(make_for_mode):
    model = with_aslr(make_for_mode())
    for threshold, rate in ((0.0, 1.0), (1.0, 0.0)):
        assert rollout(model, aslr_threshold=threshold).statistics["activation_rate_actual"] == rate


def test_without_noise_the_latent_paths_of_a_rollout_are_equal(make_for_mode):
    statistics = rollout(with_aslr(make_for_mode()), aslr_gumbel_temp=0.0).statistics
    assert max(statistics["latent_diversity_before"], statistics["latent_diversity_after"]) < 1e-6


def test_the_object_comes_when_it_is_asked_for_and_holds_the_states_record(make_for_mode):
    model, state = with_aslr(make_for_mode()), M3POGenerationState()
    output = rollout(model, m3po=state)
    assert type(output) is M3POGenerateOutput
    assert output.thinking_mask is None and output.bag_ids is None and output.embeds_ratio is None
    for name in ("row_seeds", "rollout_logps"):
        assert torch.equal(getattr(output, name), getattr(state, name))
    assert output.statistics == state.statistics and state.statistics.keys() == STATISTICS
    assert type(rollout(model, return_dict_in_generate=None)) is torch.Tensor
    steps = output.rollout_logps.shape[1]
    assert state.record_bytes >= 6 * steps * 4 + 6 * 8 + 6 * steps * 3 * 4


def test_the_position_ids_of_a_scoring_pass_are_those_of_the_rollout(make_for_mode):
    """Without them the noise of a padded row would be another: what the agreement above rests on."""
    model = with_aslr(make_for_mode())
    output = rollout(model)
    mask = torch.cat([left_padded(LENGTHS)["attention_mask"], torch.ones_like(completions_of(output))], dim=1)
    inputs = {"attention_mask": mask, "is_m3po_inference": False, "aslr_row_seeds": output.row_seeds}
    with torch.no_grad():
        right = model(output.sequences, position_ids=positions_of(mask), **inputs).logits
        wrong = model(output.sequences, **inputs).logits
    real = mask.bool()
    assert (right - wrong)[real].abs().max() > 1e-2
    unpadded = real.all(1)
    torch.testing.assert_close(right[unpadded], wrong[unpadded], atol=CLOSE, rtol=CLOSE)
