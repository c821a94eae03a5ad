# SPDX-License-Identifier: Apache-2.0
"""Episodes by the batch are those one by one, and the environments keep the rules of gymnasium and SB3."""

import warnings
from typing import Any

import gymnasium.utils.env_checker
import numpy as np
import pytest
import stable_baselines3.common.env_checker
import torch

from m3po_lab.controller.environment import Actions, GateVecEnv, GSM8KMHCEnv, Standard
from m3po_lab.controller.episodes import Episodes
from m3po_lab.controller.gates import GateSpace, from_actions, to_actions

INDICES = np.array([3, 0, 6, 3, 5, 1, 2, 4, 0])


def gates_of(episodes: Episodes, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((len(INDICES), episodes.space.size))


def test_gates_have_the_shape_of_their_kind_and_attention_comes_first():
    values = np.arange(8).reshape(2, 4) / 8
    assert GateSpace("global", 2).as_routing_gates(values[:, :1]).tolist() == [[[0.0]], [[0.5]]]
    assert GateSpace("layer", 4).as_routing_gates(values).shape == (2, 4, 1)
    by_layer = GateSpace("sublayer", 2).as_routing_gates(values)
    assert by_layer[1].tolist() == [[0.5, 0.625], [0.75, 0.875]]
    assert [GateSpace(kind, 3).size for kind in ("global", "layer", "sublayer")] == [1, 3, 6]
    with pytest.raises(ValueError, match="gates='head' is unknown"):
        GateSpace("head", 2)


def test_actions_are_gates_and_what_is_outside_is_cut():
    assert from_actions(np.array([-3.0, -1.0, 0.0, 1.0, 2.0])).tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert from_actions(to_actions(np.array([0.25, 0.75]))).tolist() == [0.25, 0.75]
    assert Actions(1, grid=5).values([0, 4, 1]).tolist() == [[0.0], [1.0], [0.25]]
    assert Actions(2, grid=3).values([[0, 2], [1, 1]]).tolist() == [[0.0, 1.0], [0.5, 0.5]]


def test_log_probs_by_the_batch_are_those_of_the_formula_one_by_one(episodes: Episodes):
    values = gates_of(episodes)
    found = episodes.log_probs(INDICES, values)
    tokenizer, model = episodes.tokenizer, episodes.model
    for row, index in enumerate(INDICES):
        problem = episodes.problems[index]
        question = tokenizer(f"Question: {problem.question}\nAnswer:").input_ids
        answer = tokenizer(f" {problem.answer}\n").input_ids
        ids = torch.tensor([[tokenizer.bos_token_id, *question, *answer]])
        with torch.no_grad():
            gate = episodes.space.as_routing_gates(values[row : row + 1])
            log_probs = model(input_ids=ids, mhc_gate=gate).logits[0, :-1].double().log_softmax(-1)
        chosen = log_probs[range(len(ids[0]) - 1), ids[0, 1:]][-len(answer) :]
        assert found[row] == pytest.approx(chosen.mean().item(), abs=1e-5)
    other = episodes.log_probs(INDICES, 1 - values)
    assert np.abs(found - other).max() > 1e-4, "the gates of this model do nothing"


def test_divergences_are_those_of_the_formula_one_by_one(episodes: Episodes):
    values = gates_of(episodes)
    found = episodes.divergences(INDICES, values)
    for row, index in enumerate(INDICES):
        problem = episodes.problems[index]
        text = f"Question: {problem.question}\nAnswer: {problem.answer}\n"
        ids = torch.tensor([[episodes.tokenizer.bos_token_id, *episodes.tokenizer(text).input_ids]])
        with torch.no_grad():
            gate = episodes.space.as_routing_gates(values[row : row + 1])
            gated, full = (
                episodes.model(input_ids=ids, mhc_gate=one).logits[0].double().log_softmax(-1) for one in (gate, 1.0)
            )
        assert found[row] == pytest.approx((full.exp() * (full - gated)).sum(-1).mean().item(), rel=1e-3, abs=1e-7)
    assert episodes.divergences(INDICES, 1.0) == pytest.approx(np.zeros(len(INDICES)), abs=1e-7)
    assert episodes.divergences(INDICES, 0.0).min() > 5e-7, "the gates of this model do nothing"


def test_greedy_answers_by_the_batch_are_those_one_by_one(episodes: Episodes):
    """References are what the model says, but for every other one."""
    values = gates_of(episodes)
    said = []
    for row, index in enumerate(INDICES):
        question = f"Question: {episodes.problems[index].question}\nAnswer:"
        ids = torch.tensor([[episodes.tokenizer.bos_token_id, *episodes.tokenizer(question).input_ids]])
        gate = episodes.space.as_routing_gates(values[row : row + 1])
        written = episodes.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), mhc_gate=gate, max_new_tokens=4, do_sample=False
        )
        said.append(episodes.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
    judged: list[str] = []

    class Kind:
        @staticmethod
        def equal(reference: str, line: str) -> bool:
            judged.append(line)
            return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("m3po_lab.controller.episodes.KINDS", {"number": Kind})
        assert episodes.correct(INDICES, values).all()
    assert sorted(judged) == sorted(text.partition("\n")[0].strip() for text in said)


def test_rewards_are_their_parts(episodes: Episodes, monkeypatch: pytest.MonkeyPatch):
    values, ones = gates_of(episodes), np.ones((len(INDICES), episodes.space.size))
    dense = episodes.rewards(INDICES, values, "dense")
    gain = episodes.log_probs(INDICES, values) - episodes.log_probs(INDICES, ones)
    assert dense["reward"] == pytest.approx(gain, abs=1e-5) and set(dense) == {"reward", "dense"}
    assert episodes.rewards(INDICES, ones, "dense")["reward"] == pytest.approx(np.zeros(len(INDICES)), abs=1e-5)
    monkeypatch.setattr(episodes, "correct", lambda indices, values: indices > 2)
    exact, mix = (episodes.rewards(INDICES, values, kind)["reward"] for kind in ("exact", "mix"))
    assert exact.tolist() == (INDICES > 2).astype(float).tolist()
    assert mix == pytest.approx(exact + dense["reward"])
    with pytest.raises(ValueError, match="reward='kind' is unknown"):
        episodes.rewards(INDICES, values, "kind")


def test_embeddings_are_the_mean_state_of_the_question(episodes: Episodes):
    found = episodes.embeddings()
    for index, problem in enumerate(episodes.problems):
        text = f"Question: {problem.question}\nAnswer:"
        ids = torch.tensor([[episodes.tokenizer.bos_token_id, *episodes.tokenizer(text).input_ids]])
        with torch.no_grad():
            state = episodes.model.model(input_ids=ids).last_hidden_state[0].mean(0)
        assert found[index] == pytest.approx(state.numpy(), abs=1e-5)
    standard = Standard.of(found)
    seen = standard(found)
    assert seen.mean(0) == pytest.approx(np.zeros(32), abs=1e-5) and seen.dtype == np.float32
    assert seen.std(0) == pytest.approx(np.ones(32), abs=1e-2) and standard(found[:2]) == pytest.approx(seen[:2])


def observations(episodes: Episodes) -> np.ndarray:
    found = episodes.embeddings()
    return Standard.of(found)(found)


def environment(episodes: Episodes, **options: Any) -> GSM8KMHCEnv:
    return GSM8KMHCEnv(episodes, observations(episodes), **options)


@pytest.mark.parametrize("grid", [None, 5])
def test_the_checkers_of_gymnasium_and_sb3_are_content(episodes: Episodes, grid: int | None):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        stable_baselines3.common.env_checker.check_env(environment(episodes, grid=grid))
        warnings.filterwarnings("ignore", message=".*(maximum|minimum) value is.*infinity")  # a state has no bounds
        gymnasium.utils.env_checker.check_env(environment(episodes, grid=grid), skip_render_check=True)


def test_equal_seeds_are_equal_episodes(episodes: Episodes):
    def played(seed: int) -> list[tuple[int, float]]:
        env = environment(episodes)
        env.action_space.seed(seed)
        env.reset(seed=seed)
        found = []
        for _ in range(4):
            _, reward, terminated, truncated, info = env.step(env.action_space.sample())
            assert terminated and not truncated and info["reward"] == reward
            found.append((info["problem"], reward))
            env.reset()
        return found

    assert played(3) == played(3) and played(3) != played(4)
    assert environment(episodes).reset(options={"problem": 5})[1] == {"problem": 5}


def vector(episodes: Episodes, **options: Any) -> GateVecEnv:
    return GateVecEnv(episodes, observations(episodes), 4, **options)


def test_the_vector_environment_has_the_episodes_of_the_single_one(episodes: Episodes):
    many, one = vector(episodes), environment(episodes)
    seen = many.reset()
    actions = np.random.default_rng(1).uniform(-1, 1, (4, episodes.space.size)).astype(np.float32)
    many.step_async(actions)
    following, rewards, done, infos = many.step_wait()
    assert done.all() and following.shape == seen.shape
    for row, info in enumerate(infos):
        state, _ = one.reset(options={"problem": info["problem"]})
        assert state.tolist() == seen[row].tolist() == info["terminal_observation"].tolist()
        assert one.step(actions[row])[1] == pytest.approx(rewards[row], abs=1e-5)
        assert info["gate"] == pytest.approx(from_actions(actions[row]))
    passed = [info["problem"] for info in infos]
    for _ in range(6):
        many.step_async(actions)
        passed += [info["problem"] for info in many.step_wait()[3]]
    assert sorted(passed[:7]) == list(range(7)), "a pass over the split has each problem once"


def test_a_unit_divides_rewards_and_not_their_parts(episodes: Episodes):
    plain, scaled = vector(episodes), vector(episodes, unit=0.25)
    actions = np.random.default_rng(2).uniform(-1, 1, (4, episodes.space.size)).astype(np.float32)
    (rewards, infos), (more, same) = (
        (env.reset(), env.step_async(actions), env.step_wait()[1:4:2])[2] for env in (plain, scaled)
    )
    assert more == pytest.approx(4 * rewards, abs=1e-5) and np.abs(rewards).max() > 1e-4
    assert [info["dense"] for info in infos] == [info["dense"] for info in same] == scaled.rewards_seen


def test_a_stopped_vector_environment_goes_on_with_the_same_problems(episodes: Episodes):
    first, again = vector(episodes, seed=1), vector(episodes, seed=2)
    first.reset()
    again.set_state(first.state())
    assert np.array_equal(again.reset(), first.observations[first.state()["problems"]])
    actions = np.zeros((4, episodes.space.size), dtype=np.float32)
    for _ in range(3):
        results = []
        for env in (first, again):
            env.step_async(actions)
            results.append([info["problem"] for info in env.step_wait()[3]])
        assert results[0] == results[1]


def test_the_model_is_left_as_it_was(episodes: Episodes):
    before = {name: value.clone() for name, value in episodes.model.state_dict().items()}
    episodes.rewards(INDICES, gates_of(episodes), "mix")
    assert all(torch.equal(value, before[name]) for name, value in episodes.model.state_dict().items())
    assert not episodes.model.training
