# SPDX-License-Identifier: Apache-2.0
"""The commands: a controller trained from one line, killed, gone on with, evaluated by lm-eval; or refused in one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference.hyper_models import trained

from m3po_lab import eval_mhc, train_controller
from m3po_lab.controller import fits
from m3po_lab.controller.comparison import compare
from m3po_lab.controller.effects import grid_effects
from m3po_lab.controller.figures import FIGURES
from m3po_lab.controller.gates import GateSpace
from m3po_lab.controller.report import answer_lines, effect_table, level_table
from m3po_lab.pretraining.data import byte_tokenizer
from m3po_lab.pretraining.variants import ShortContext, Variant

FIXTURES = Path(__file__).parents[2] / "fixtures/lm_eval"
SIZES = {
    "num_train_problems": 24,
    "num_eval_problems": 12,
    "budget": 96,
    "rollout_size": 32,
    "num_envs": 16,
    "minibatch_size": 16,
    "control_grid": 3,
    "max_new_tokens": 3,
}
SMALL = [*(word for name, value in SIZES.items() for word in (f"--{name}", str(value))), "--seeds", "0", "1"]


def save(folder: Path, louder: float) -> str:
    """A tiny model as if trained; `louder` output weights make the gate's effect larger."""
    model = trained("NanoChat", vocab_size=320, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    with torch.no_grad():
        model.lm_head.weight.mul_(louder)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("mhc") / "final", 40.0)


@pytest.fixture(scope="module")
def trained_once(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "controller"
    assert train_controller.main([checkpoint, *SMALL, "--output_dir", str(folder)]) == 0
    return folder


def result_of(folder: Path) -> Any:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def test_one_command_leaves_policies_controls_tables_and_figures(trained_once: Path):
    report = (trained_once / "report.md").read_text(encoding="utf-8")
    for name in FIGURES:
        assert f"({name}.png)" in report and (trained_once / f"{name}.png").stat().st_size > 5000
    assert "against 1" not in report.split("##")[0] and "Between gates 0 and 1" in report
    for row in ("ppo, global", "ppo, layer", "best vector, layer", "bandit, global", "random, layer", "oracle"):
        assert f"| {row}" in report
    assert "best vector, global" not in report
    result = result_of(trained_once / "layer-seed1")
    assert list(result["fits"]) == ["ppo", "bandit", "best constant", "best vector", "random"]
    assert np.array(result["fits"]["ppo"]["gates"]).shape == (12, 2)
    assert [row["spent"] for row in result["curve"]] == [56, 88], "24 random pairs, then rollouts of 32"
    assert {name: fit["spent"] <= 96 for name, fit in result["fits"].items()} == dict.fromkeys(result["fits"], True)
    assert list((trained_once / "layer-seed1").glob("events.out.tfevents.*"))


def test_a_killed_command_goes_on_and_ends_with_the_same_results(
    checkpoint: str, trained_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    words = [checkpoint, *SMALL, "--gates", "layer", "--output_dir", str(tmp_path / "again")]
    worth = fits.worth

    def killed(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fits, "worth", killed)
        assert train_controller.main(words) == 130
    assert "The same command goes on from there." in capsys.readouterr().err
    assert train_controller.main(words) == 0
    for seed in (0, 1):
        whole, again = (result_of(folder / f"layer-seed{seed}") for folder in (trained_once, tmp_path / "again"))
        assert whole == again
    monkeypatch.setattr(fits, "worth", killed)
    assert worth is not killed and train_controller.main(words) == 0, "all is done: nothing is tried again"
    assert train_controller.main([*words, "--budget", "128"]) == 2
    assert "--budget 128: " in (text := capsys.readouterr().err) and "has results with 96; set that" in text


def test_a_gate_without_effect_stops_before_anything_is_trained(tmp_path: Path, capsys: Any):
    words = [save(tmp_path / "final", 1.0), *SMALL, "--output_dir", str(tmp_path / "controller")]
    assert train_controller.main(words) == 2
    error = capsys.readouterr().err
    assert "The routing gate does nothing here" in error and "--mhc_gate_noise" in error and error.count("\n") == 1
    assert not (tmp_path / "controller").exists()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "Give a checkpoint first"),
        (["configs/controller_arithmetic.yaml"], "Give a checkpoint first"),
        (["nowhere"], "nowhere is not a model folder"),
        (["nowhere", "--gates", "head"], "--gates head is unknown; give global or layer or sublayer"),
        (["nowhere", "--reward", "sparse"], "--reward sparse is unknown; give dense or exact or mix"),
        (["nowhere", "--budget", "10"], "--budget 10: it must be at least two rollouts of 256"),
        (["nowhere", "--rollout_size", "100"], "--rollout_size 100: it must be a multiple of num_envs = 64"),
        (["nowhere", "--num_envs", "0"], "--num_envs 0: it must be a whole number of at least 1"),
        (["nowhere", "--max_new_tokens", "-1"], "--max_new_tokens -1: it must be a whole number of at least 1"),
        (["nowhere", "--seeds", "1", "1"], "give different ones"),
        (["nowhere", "--control_grid", "1"], "--control_grid 1: it must be at least 2"),
        (["nowhere", "--bugdet", "10"], "Did you mean --budget?"),
        (["nowhere", "other.yaml"], "the project has configs/controller_arithmetic.yaml"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(words: list[str], why: str, capsys: Any):
    assert train_controller.main(words) == 2
    error = capsys.readouterr().err
    assert why in error and error.count("\n") == 1


def test_differences_are_those_of_the_experiments_and_a_planted_one_is_found(checkpoint: str):
    """Made-up results: PPO is worth 0.1 nats more on every problem and right where gate 1 is and on ten more."""
    random = np.random.default_rng(0)
    base = random.normal(size=40)
    correct = np.arange(40) < 10
    grid = [{"gate": gate, "dense": list(base), "correct": correct.tolist(), "divergence": 0.1} for gate in (0.0, 1.0)]

    def fit(gain: float, more: int) -> dict[str, Any]:
        noise = 0.01 * random.normal(size=40)
        return {"dense": list(base + gain + noise), "correct": (np.arange(40) < 10 + more).tolist(), "spent": 9}

    results = [
        {"gates": "global", "seed": seed, "fits": {"ppo": fit(0.1, 10 + seed), "best constant": fit(0.0, 0)}}
        for seed in range(5)
    ]
    effects = {"grid": grid, "preflight": 0.01}
    values, compared = compare(effects, results, "dense")
    found = {(one.one, one.other): one for one in compared}
    assert set(found) == {
        ("gate 0", "gate 1"),
        ("ppo, global", "gate 1"),
        ("best constant, global", "gate 1"),
        ("ppo, global", "best constant, global"),
    }
    planted = found["ppo, global", "gate 1"]
    assert planted.difference.estimate == pytest.approx(0.1, abs=5e-3) and planted.p_holm < 1e-3
    assert found["best constant, global", "gate 1"].p_holm > 0.05 and found["gate 0", "gate 1"].p_holm == 1
    lines = answer_lines(effects, {"dense": compared})
    assert any("ppo, global differs from gate 1" in line for line in lines)
    assert "25.0 (14.2 to 40.2)" in effect_table(effects), "Wilson's interval of 10 in 40"
    assert "| ppo, global | +" in level_table({"dense": values}, effects)
    assert compare(effects, results[:1], "dense")[1] == []


def test_grid_effects_begin_at_identity_and_end_at_the_default(episodes: Any):
    found = grid_effects(episodes, 3)
    assert [row["gate"] for row in found] == [0.0, 0.5, 1.0]
    assert found[-1]["dense"] == pytest.approx([0.0] * 7, abs=1e-5) and found[-1]["divergence"] < 1e-7
    assert found[0]["divergence"] > found[1]["divergence"] > 1e-8


GATES = [[0.1, 0.9]], [[1.0, 0.0]]


def by_a_component(embeddings: np.ndarray) -> torch.Tensor:
    """A controller with two gates, by whether a component is above its threshold."""
    return GateSpace("layer", 2).as_routing_gates(
        np.where(embeddings[:, :1] > THRESHOLD[0], [[0.1, 0.9]], [[1.0, 0.0]])
    )


THRESHOLD = [0.0]


def test_each_prompt_has_the_gate_of_its_own_context(checkpoint: str):
    """lm-eval's log-likelihoods and generations with a controller are those of each prompt alone with its gate."""
    from m3po_lab.models.embedding import mean_state
    from m3po_lab.models.loading import load_base_model

    model, tokenizer = load_base_model(checkpoint)
    contexts = [tokenizer(text).input_ids for text in ("abc", "What is 7?", "zz zz zz", "Q")]
    embeddings = [mean_state(model, torch.tensor([ids]), torch.ones(1, len(ids)))[0, 0] for ids in contexts]
    THRESHOLD[0] = float(np.median(embeddings))
    variant = Variant(model, tokenizer, controller=by_a_component)
    lm = ShortContext(variant, batch_size=4, max_length=128, device="cpu")
    endings = [tokenizer(text).input_ids for text in (" yes", " no")]
    requests = [(("", ""), ids, ending) for ids in contexts for ending in endings]
    found = lm._loglikelihood_tokens(requests)
    seen = set()
    for (_, ids, ending), (value, _) in zip(requests, found, strict=True):
        gate = variant.gate_of(torch.tensor([ids]), torch.ones(1, len(ids)))["mhc_gate"]
        seen.add(tuple(gate.flatten().tolist()))
        with torch.no_grad():
            log_probs = model(torch.tensor([ids + ending]), mhc_gate=gate).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        assert value == pytest.approx(log_probs[range(len(ending)), ending].sum().item(), abs=1e-4)
        plain = model(torch.tensor([ids + ending])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        assert value != pytest.approx(plain[range(len(ending)), ending].sum().item(), abs=1e-4)
    assert len(seen) == 2, "both gates are set"

    batch = tokenizer(["abc", "zz zz zz"], return_tensors="pt", padding=True, padding_side="left")
    together = lm._model_generate(
        batch.input_ids, max_length=16, stop=["\n"], attention_mask=batch.attention_mask, do_sample=False
    )
    for row, ids in enumerate((contexts[0], contexts[2])):
        alone = model.generate(
            torch.tensor([ids]), max_new_tokens=5, do_sample=False,
            **variant.gate_of(torch.tensor([ids]), torch.ones(1, len(ids))),
        )  # fmt: skip
        start = batch.input_ids.shape[1]
        assert together[row, start : start + 5].tolist() == alone[0, len(ids) :].tolist()


def test_a_policy_is_evaluated_beside_its_model_constant_gates_and_a_baseline(
    checkpoint: str, trained_once: Path, tmp_path: Path, capsys: Any
):
    words = [checkpoint, "--baseline", checkpoint, "--controller", str(trained_once / "layer-seed0"), "--limit", "2"]
    words += ["--data", str(FIXTURES), "--tasks", "gsm8k", "arc_easy", "bits_per_byte"]
    assert eval_mhc.main([*words, "--output_dir", str(tmp_path / "eval")]) == 0
    printed = capsys.readouterr().out
    assert "| | model | policy | gate 0 | best constant | baseline |" in printed
    results = json.loads((tmp_path / "eval/results.json").read_text(encoding="utf-8"))["results"]
    bits = {name: of["bits_per_byte"]["bits_per_byte,none"] for name, of in results.items()}
    assert bits["model"] == bits["baseline"] != bits["policy"] and bits["gate 0"] not in (bits["model"], bits["policy"])
    other = save(tmp_path / "other", 41.0)
    assert eval_mhc.main([other, *words[3:], "--output_dir", str(tmp_path / "other_eval")]) == 2
    assert "--controller was trained on another model than" in capsys.readouterr().err
    assert eval_mhc.main([checkpoint, "--controller", str(tmp_path), *words[5:]]) == 2
    assert "has no policy: give a folder like" in capsys.readouterr().err
