# SPDX-License-Identifier: Apache-2.0
"""What must hold with every gate that is registered, at its own temperature and matched: λ = 0, groups, lonely
paths, padding, agreement with the scoring pass, statistics; and where a model keeps a learnable gating function."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from reference import gates as reference
from reference import learnable_gates
from reference.gated import STRONG
from reference.tiny import LIVELY, alive_after, left_padded, small_tokenizer, teacher_forced_logps
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2ForCausalLM
from transformers.m3po import M3POGenerationState, attach_gating
from transformers.m3po.gating import list_gating_functions
from transformers.m3po.gating.factory import gating_class
from transformers.m3po.gating.module import gating_of_model
from transformers.m3po.thinking.thoughts import thought_bags

EOS = [2, 60, 61, 62]
ENDLESS = {"eos_token_id": 255, "suppress_tokens": [255]}  # every row draws at every step
TEMPERATURE = 0.7
ENTRIES = 64  # the default of thought_top_k
SIZE = {"luong": {"rank": 8}, "bahdanau": {"attention_dim": 16}}
LEARNABLE = [name for name in list_gating_functions() if gating_class(name).learnable]
GATES = [*list_gating_functions(), *(f"{name} behind the embeddings" for name in LEARNABLE)]
MATCH = {"cross_path_temp": "match"}
MODES = pytest.mark.parametrize(("mode", "sharpness"), [("m3po", {}), ("h3po", MATCH)], ids=["m3po", "h3po matched"])


def by_turns(first):
    """Every gate once, at its own temperature (0) or matched (1) by turns; tests begin with either."""
    pairs = [(gate, MATCH if (first + number) % 2 else {}) for number, gate in enumerate(GATES)]
    return pytest.mark.parametrize(("gate", "sharpness"), pairs, ids=GATES)


@pytest.fixture(params=GATES)
def gate(request):
    return request.param


@pytest.fixture
def make(tiny_llama, tiny_qwen2):
    """A lively model of a mode with what the gate needs, off its start: of either family by turns."""

    def model(gate, mode="m3po"):
        family = (tiny_llama, tiny_qwen2)[GATES.index(gate) % 2]
        return with_gate(family(**LIVELY, **(STRONG if mode == "h3po" else {})), gate)

    return model


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def name_of(gate):
    return gate.split()[0]


def options_of(gate):
    return {**SIZE[name_of(gate)], "project_embeddings": "behind" in gate}


def with_gate(model, gate):
    if name_of(gate) in LEARNABLE:
        attach_gating(model, name_of(gate), options_of(gate))
        move(model)
    return model


def move(model, by=0.2):
    """Moves a model's gate off where it is."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.base_model.m3po_gating.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(by * noise * weight.square().mean().sqrt())


def rollout(model, gate, prompts=None, seed=2, **overrides):
    arguments = {
        **(prompts or left_padded([4, 9, 7])),
        "tokenizer": small_tokenizer(),
        "do_sample": True,
        "temperature": TEMPERATURE,
        "top_k": 0,
        "num_return_sequences": 4,
        "max_new_tokens": 14,
        "eos_token_id": EOS,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        "enable_cross_path": True,
        "cross_path_lambda": 0.3,
        "gating_type": name_of(gate),
    }
    torch.manual_seed(seed)
    return model.generate(**(arguments | overrides))


def plain(model, **overrides):
    off = dict.fromkeys(("enable_cross_path", "cross_path_lambda", "gating_type"))
    return rollout(model, "none", **(off | overrides))


def completions(output):
    return output.sequences[:, -output.rollout_logps.shape[1] :]


@by_turns(1)
def test_at_lambda_zero_no_gate_changes_plain_decoding(make, gate, sharpness):
    model, states = make(gate), [M3POGenerationState(), M3POGenerationState()]
    outputs, randoms = [], []
    for state, call in zip(states, ({"cross_path_lambda": 0.0, **sharpness}, None), strict=True):
        given = {"m3po": state, "output_scores": True}
        outputs.append(plain(model, **given) if call is None else rollout(model, gate, **call, **given))
        randoms.append(torch.get_rng_state())
    zero, off = outputs
    assert torch.equal(zero.sequences, off.sequences) and torch.equal(*randoms)
    assert all(torch.equal(a, b) for a, b in zip(zero.scores, off.scores, strict=True))
    assert torch.equal(states[0].rollout_logps, states[1].rollout_logps)
    assert zero.bag_ids is None and not any("attention" in name for name in states[0].statistics)
    blended = rollout(model, gate, **sharpness)
    assert not torch.equal(blended.sequences, off.sequences), "the test cannot tell"


@by_turns(0)
def test_no_gate_lets_groups_mix(make, gate, sharpness):
    model, prompts = make(gate), left_padded([9, 9, 9])
    other = {name: value.clone() for name, value in prompts.items()}
    other["input_ids"][1] = torch.arange(140, 149)
    before, after = (rollout(model, gate, p, **ENDLESS, **sharpness) for p in (prompts, other))
    assert not torch.equal(before.sequences[4:8, 9:], after.sequences[4:8, 9:])
    for rows in (slice(0, 4), slice(8, 12)):
        for name in ("sequences", "bag_ids", "bag_weights"):
            assert torch.equal(getattr(before, name)[rows], getattr(after, name)[rows]), name
    one = torch.zeros(12, dtype=torch.long)
    given = {**ENDLESS, **sharpness}
    together = [rollout(model, gate, p, m3po=M3POGenerationState(group_ids=one), **given) for p in (prompts, other)]
    assert not torch.equal(together[0].bag_weights[:4], together[1].bag_weights[:4]), "the test cannot tell"


@MODES
def test_with_every_gate_a_path_whose_peers_have_left_keeps_its_own_vector(make, gate, mode, sharpness):
    model = make(gate, mode)
    output = rollout(model, gate, return_thinking_embeds=True, output_scores=True, max_new_tokens=40, **sharpness)
    active = output.thinking_mask & alive_after(completions(output), EOS)
    alone = active & (active.view(3, 4, -1).sum(1).repeat_interleave(4, 0) == 1)
    assert alone.any(), "nobody was left alone"
    if mode == "m3po":
        own = model.get_input_embeddings()(completions(output)[alone])
        assert torch.equal(output.thinking_embeds[alone], own) and not output.bag_weights[alone].any()
    else:
        ids, weights = thought_bags(torch.stack(output.scores, dim=1).softmax(-1)[alone], ENTRIES, 256)
        assert torch.equal(output.bag_ids[alone], ids) and torch.equal(output.bag_weights[alone], weights)
    assert output.thinking_embeds.isfinite().all() and output.rollout_logps.isfinite().all()
    assert all(value.isfinite() for value in output.statistics.values())


@by_turns(1)
def test_with_every_gate_a_group_of_one_decodes_as_if_alone(make, gate, sharpness):
    """Among larger groups, whose size the record has, and where all groups are of one."""
    model = make(gate)
    state = M3POGenerationState(group_ids=torch.tensor([5, 5, 5, 5, 2, 8, 8, 8, 8, 0, 0, 0]))
    output = rollout(model, gate, m3po=state, return_thinking_embeds=True, **ENDLESS, **sharpness)
    alone = plain(model, m3po=M3POGenerationState(), **ENDLESS)
    assert torch.equal(output.sequences[4], alone.sequences[4]) and not output.bag_weights[4].any()
    assert torch.equal(output.thinking_embeds[4], model.get_input_embeddings()(completions(output)[4]))
    assert output.thinking_embeds.isfinite().all() and (output.bag_weights[:4, :-1] > 0).any(-1).any()
    ones = rollout(model, gate, m3po=M3POGenerationState(group_ids=torch.arange(12)), **ENDLESS, **sharpness)
    assert torch.equal(ones.sequences, alone.sequences) and ones.bag_ids is None


@by_turns(0)
def test_the_order_of_the_rows_makes_no_difference_to_any_gate(make, gate, sharpness):
    """Greedy, of a prompt for each row: of paths, nothing but who they listen to depends on the others."""
    model, prompts = make(gate), left_padded([9, 4, 7, 9, 5, 8, 6, 9])
    groups = torch.tensor([0, 1, 1, 0, 0, 1, 2, 1])
    order = torch.tensor([3, 6, 1, 0, 7, 4, 2, 5])
    outputs = []
    for rows in (torch.arange(8), order):
        given = {name: value[rows] for name, value in prompts.items()}
        state = M3POGenerationState(group_ids=groups[rows])
        call = {"do_sample": False, "temperature": None, "top_k": None, "num_return_sequences": 1, **ENDLESS}
        outputs.append(rollout(model, gate, given, m3po=state, return_thinking_embeds=True, **call, **sharpness))
    first, second = outputs
    assert torch.equal(first.sequences[order], second.sequences)
    torch.testing.assert_close(first.thinking_embeds[order], second.thinking_embeds, atol=1e-3, rtol=0)
    assert (first.bag_weights[..., 1:] > 0.05).any() and not first.bag_weights[6].any()


@by_turns(1)
def test_padding_on_the_left_makes_no_difference_to_any_gate(make, gate, sharpness):
    model, prompts = make(gate), left_padded([4, 9, 7])
    wider = {name: torch.nn.functional.pad(value, (5, 0)) for name, value in prompts.items()}
    first, second = (rollout(model, gate, p, **sharpness) for p in (prompts, wider))
    assert torch.equal(completions(first), completions(second))
    assert torch.equal(first.bag_ids, second.bag_ids)
    torch.testing.assert_close(first.bag_weights, second.bag_weights, atol=1e-3, rtol=0)


@MODES
def test_with_every_gate_rollout_and_scoring_pass_agree_to_1e_4(make, gate, mode, sharpness):
    model, prompts = make(gate, mode), left_padded([4, 9, 7])
    output = rollout(model, gate, prompts, cross_path_top_k=2, **sharpness)

    def largest_difference(**bags):
        logps = teacher_forced_logps(model, output.sequences, prompts["attention_mask"], TEMPERATURE, **bags)
        return (logps - output.rollout_logps)[output.rollout_logps != 0].abs().max()

    bags = {"thinking_bag_ids": output.bag_ids, "thinking_bag_weights": output.bag_weights}
    assert largest_difference(**bags) < 1e-4 and largest_difference() > 0.05


# What a rollout says of its gate


def read_by(model, probs):
    """What a gate's matrices are laid on (N, V) or (N, H), and its parameters, all in float64."""
    own = {name: value.double() for name, value in model.base_model.m3po_gating.state_dict().items()}
    kept = torch.from_numpy(np.stack([np.where(p >= np.sort(p)[-ENTRIES], p, 0.0) for p in probs]))
    if "whitening" in own:
        table = model.get_input_embeddings().weight.detach().double()
        kept = (kept * own["token_scale"]) @ table @ own["whitening"]
    return kept, own


def attention_of(model, gate, output, temperature):
    """A of every step and group in float64, (T, 3, 4, 4), from the scores that the tokens were drawn from."""
    probs = torch.stack(output.scores, dim=1).softmax(-1).double().numpy()
    active = (output.thinking_mask & alive_after(completions(output), EOS)).numpy()
    found = np.zeros((probs.shape[1], 3, 4, 4))
    for step in range(probs.shape[1]):
        for group in range(3):
            rows = slice(4 * group, 4 * group + 4)
            if active[rows, step].sum() < 2:
                continue
            if name_of(gate) in LEARNABLE:
                read, given = read_by(model, probs[rows, step])
                scores = learnable_gates.similarity(name_of(gate), given, read).numpy()
            else:
                scores = reference.similarity(gate, probs[rows, step])
            found[step, group] = reference.attention(scores, active[rows, step], temperature)
    return found


def entropies(weights):
    return -(weights * np.log(np.where(weights > 0, weights, 1.0))).sum(-1)


def test_statistics_are_those_of_the_attention_and_the_cut_is_the_weight_left_out(make, gate):
    model = make(gate)
    output = rollout(model, gate, output_scores=True, max_new_tokens=8, cross_path_top_k=1)
    weights = attention_of(model, gate, output, gating_class(name_of(gate)).default_temperature)
    listens = weights.sum(-1) > 0
    cut = (1.0 - weights.max(-1))[listens].mean()
    assert output.statistics["attention_cut"].item() == pytest.approx(cut, abs=1e-3) and cut > 1e-3
    whole = rollout(model, gate, output_scores=True, max_new_tokens=8)
    weights = attention_of(model, gate, whole, gating_class(name_of(gate)).default_temperature)
    listens = weights.sum(-1) > 0
    told = {"attention_entropy": entropies(weights)[listens].mean(), "attention_max": weights.max(-1)[listens].mean()}
    for name, value in told.items():
        assert whole.statistics[name].item() == pytest.approx(value, abs=2e-3), name


def test_matched_every_gate_is_as_sharp_as_the_baseline(make, gate):
    model = make(gate)
    output = rollout(model, gate, output_scores=True, max_new_tokens=8, **MATCH)
    weights = attention_of(model, "baseline", output, 0.1)
    expected = entropies(weights)[weights.sum(-1) > 0].mean()
    assert output.statistics["attention_entropy"].item() == pytest.approx(expected, abs=3e-3)
    assert 0.1 < expected < 0.9, "between one peer and all three"


ALWAYS = {"attention_entropy", "attention_max", "attention_variance", "active_paths"}
ALWAYS |= {"similarity_mean", "similarity_min", "similarity_max"}
THOUGHTS = {"embeds_ratio", "hidden_ratio", "mix_norm"}


@pytest.mark.parametrize("mode", ["m3po", "h3po"])
def test_all_gates_report_the_same_numbers(make, gate, mode):
    model = make(gate, mode)
    always = ALWAYS | (THOUGHTS if mode == "h3po" else set())
    few = {"max_new_tokens": 4}
    assert rollout(model, gate, **few).statistics.keys() == always
    for top_k, cuts in ((2, True), (3, False)):
        found = rollout(model, gate, cross_path_top_k=top_k, **few).statistics
        assert found.keys() == always | ({"attention_cut"} if cuts else set())
        assert all(value.dim() == 0 and value.isfinite() for value in found.values())
    # The baseline is what the others are matched to: it keeps its own temperature.
    matched = set() if gate == "baseline" else {"matched_temperature"}
    found = rollout(model, gate, **few, **MATCH).statistics
    assert found.keys() == always | matched and found.get("matched_temperature", 1.0) > 0


# The gate of a model


@pytest.fixture(params=[gate for gate in GATES if name_of(gate) in LEARNABLE])
def learnable(request):
    return request.param


def test_a_gate_that_learns_and_a_model_without_it_are_refused_in_one_line(make, tiny_llama, learnable):
    other = next(name for name in LEARNABLE if name != name_of(learnable))
    for model, said in (
        (tiny_llama(), "the model has no such gating function.*attach_gating.*gating_type='baseline'"),
        (make(other), f"the model has {other!r}.*gating_type={other!r}"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            rollout(model, learnable)
        assert str(error.value).startswith(f"gating_type={name_of(learnable)!r} learns") and "\n" not in str(
            error.value
        )


def test_a_model_uses_the_gate_that_it_has_unless_another_is_named(make, learnable):
    model = make(learnable)
    named, unnamed, other = (rollout(model, learnable, gating_type=name)
                             for name in (name_of(learnable), None, "baseline"))  # fmt: skip
    assert torch.equal(named.sequences, unnamed.sequences) and torch.equal(named.bag_weights, unnamed.bag_weights)
    assert not torch.equal(unnamed.sequences, other.sequences)
    move(model)
    assert not torch.equal(rollout(model, learnable, gating_type=None).bag_weights, unnamed.bag_weights)
    untouched = plain(model, m3po=M3POGenerationState())
    assert untouched.sequences.shape[0] == 12 and not hasattr(untouched, "bag_ids")


def saved(folder):
    """The names in `config.json` and `generation_config.json`, and those of the weights."""
    texts = [(folder / name).read_text() for name in ("config.json", "generation_config.json")]
    return "".join(texts), load_file(folder / "model.safetensors")


def test_with_everything_off_nothing_of_a_gate_is_saved(make, tiny_llama, tmp_path):
    given = {"m3po_gating_type": "luong", "m3po_gating_config": {"rank": 8}}
    with_one = make("luong")
    with_one.save_pretrained(tmp_path / "gated")
    left_out = type(with_one).from_pretrained(tmp_path / "gated", m3po_gating_enabled=False)
    for number, model in enumerate((tiny_llama(), tiny_llama(m3po_gating_enabled=False, **given), left_out)):
        assert not [name for name in model.state_dict() if "gating" in name]
        model.save_pretrained(tmp_path / f"{number}")
        texts, weights = saved(tmp_path / f"{number}")
        assert "gating" not in texts and not [name for name in weights if "gating" in name]
    texts, weights = saved(tmp_path / "gated")
    assert "m3po_gating_enabled" in texts and "model.m3po_gating.U" in weights, "the test cannot tell"
    for name, value in left_out.state_dict().items():
        assert torch.equal(value, with_one.state_dict()[name])


def test_a_saved_gate_comes_back_bit_for_bit(make, learnable, tmp_path):
    model = make(learnable)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.config.m3po_gating_config == options_of(learnable)
    own, loaded = (net.base_model.m3po_gating.state_dict() for net in (model, again))
    assert own.keys() == loaded.keys() and all(torch.equal(value, loaded[name]) for name, value in own.items())
    assert torch.equal(rollout(model, learnable).sequences, rollout(again, learnable).sequences)


def test_a_plain_checkpoint_gets_a_gate_in_its_start(tiny_llama, tiny_qwen2, learnable, tmp_path):
    """An approximation of p · q, as attach_gating makes it; behind the embeddings, behind the model's own."""
    net = (tiny_llama, tiny_qwen2)[GATES.index(learnable) % 2]
    net(**LIVELY).save_pretrained(tmp_path)
    kind = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM}[net().config.model_type]
    size = {name: 16 * number for name, number in SIZE[name_of(learnable)].items()}
    options = {**size, "project_embeddings": "behind" in learnable}
    fields = {"m3po_gating_type": name_of(learnable), "m3po_gating_config": options}
    model = kind.from_pretrained(tmp_path, m3po_gating_enabled=True, **fields)
    gate = gating_of_model(model, name_of(learnable))
    for name, weight in gate.named_parameters():
        assert weight.dtype == torch.float32 and weight.isfinite().all() and (weight != 0).all(), name
    if "behind" in learnable:
        attached = net(**LIVELY)
        attach_gating(attached, name_of(learnable), options)
        for name in ("whitening", "token_scale"):
            found, start = getattr(gate, name), torch.eye(32) if name == "whitening" else torch.ones(256)
            torch.testing.assert_close(found, getattr(attached.base_model.m3po_gating, name), rtol=1e-4, atol=1e-4)
            assert (found - start).abs().max() > 0.1
    probs = torch.eye(256)[:8] * 0.7 + torch.eye(256)[[0, 0, 1, 1, 2, 2, 3, 3]] * 0.3
    similarity, product = gate(probs, embed_tokens=model.get_input_embeddings()), probs @ probs.mT
    pairs = torch.triu_indices(8, 8, 1)
    found = torch.corrcoef(torch.stack([similarity[pairs[0], pairs[1]], product[pairs[0], pairs[1]]]).detach())
    assert found[0, 1] > 0.6, "the start is no dot product"


def test_a_token_without_an_embedding_does_not_blow_up_a_gate(tiny_llama):
    """The padding row of a fresh model is zero, and with tied embeddings training moves it."""
    model = tiny_llama(**LIVELY)
    attach_gating(model, "luong", {"rank": 8, "project_embeddings": True})
    with torch.no_grad():
        assert not model.get_input_embeddings().weight[0].any()
        model.get_input_embeddings().weight[0] = 1e-3
    similarity = gating_of_model(model, "luong")(torch.randn(4, 256).softmax(-1), embed_tokens=model.model.embed_tokens)
    assert similarity.isfinite().all() and similarity.abs().max() < 10


@pytest.mark.parametrize("how", ["missing", "misshaped"])
def test_a_checkpoint_that_lacks_a_part_of_its_gate_is_an_error(make, learnable, how, tmp_path):
    model = make(learnable)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in [name for name in weights if "m3po_gating" in name]:
        part = dict(weights)
        taken = part.pop(name)
        if how == "misshaped":
            part[name] = taken[:-1].contiguous()
        save_file(part, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"says m3po_gating_enabled=True.*has no {name} of the right") as error:
            type(model).from_pretrained(tmp_path, ignore_mismatched_sizes=True)
        assert "\n" not in str(error.value)
        assert type(model).from_pretrained(tmp_path, m3po_gating_enabled=False).config.m3po_gating_enabled is False


def test_a_checkpoint_whose_configuration_hides_its_gate_is_an_error(make, tmp_path):
    model = make("luong")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "gating" not in k}))
    with pytest.raises(ValueError, match="has model.m3po_gating.U but its config.json does not say") as error:
        type(model).from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "gating_type='' is unknown"),
        ({"m3po_gating_type": "baseline"}, "m3po_gating_type='baseline' has no parameters"),
        ({"m3po_gating_type": "luong", "m3po_gating_config": {"rank": 0}}, "rank=0 is no whole number above 0"),
    ],
)
def test_a_configuration_with_half_a_gate_is_refused(fields, said):
    with pytest.raises(Exception, match=said):
        LlamaConfig(m3po_gating_enabled=True, **fields)
