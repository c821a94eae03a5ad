# SPDX-License-Identifier: Apache-2.0
"""Everything off is upstream, in generation and training, and λ = 0 is the mode without cross-path, bit for bit.

The pristine wheels and the patched trees run the same programs, one process each, side by side.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.families import FAMILIES, WITH_STREAMS
from reference.tiny import LIVELY, left_padded, small_tokenizer
from transformers.m3po import M3POGenerationState, hooks
from trl.trainer.m3po.config import M3POArguments

ROOT = Path(__file__).resolve().parents[2]
OURS = "cross_path", "gating", "answer_start", "thinking", "m3po", "mhc"
SEVERAL = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "num_iterations": 2,
    "max_steps": 5,
}
RUNS = {
    "llama": ("llama", {}),
    **{family: (family, {}) for family in FAMILIES if family != "llama"},
    "llama, several steps and iterations": ("llama", SEVERAL),
    "qwen2, accumulation and temperature": (
        "qwen2",
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "temperature": 0.7, "max_steps": 3},
    ),
}

WITH_THOUGHTS = ("llama, several steps and iterations", "qwen2, accumulation and temperature")
ZERO = {"mode": "m3po", "cross_path_lambda": 0.0, "answer_start": "#"}
THOUGHTS = {"answer_start": "#", "thinking_residual_r_min": 0.3, "thinking_residual_r_max": 0.6}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "pristine": {"pristine": {}},
    "patched": {
        "none": {"mode": "none"},
        "zero": ZERO,
        "hrpo": {**THOUGHTS, "mode": "hrpo"},
        "zero, thoughts": {**THOUGHTS, "mode": "h3po", "cross_path_lambda": 0.0},
    },
}


def unpack(folder: Path) -> bool:
    """Unpacks the pinned wheels of the overlay's cache; whether they were there."""
    for name in ("transformers", "trl"):
        wheels = sorted((ROOT / ".cache" / "wheels").glob(f"{name}-*.whl"))
        if not wheels:
            return False
        with zipfile.ZipFile(wheels[-1]) as archive:
            archive.extractall(folder)
    return True


def start(which: str, folder: Path, path: str) -> subprocess.Popen[str]:
    """Starts the programs on one of the trees: every run of RUNS; in the modes with thoughts those of WITH_THOUGHTS."""
    runs = [
        {"name": f"{variant}: {name}", "kind": kind, "flags": {**given, **flags}}
        for variant, flags in VARIANTS[which].items()
        for name, (kind, given) in RUNS.items()
        if name in WITH_THOUGHTS or flags.get("mode") not in ("hrpo", "h3po")
    ]
    program = ROOT / "tests" / "reference" / "upstream_facts.py"
    command = [sys.executable, str(program), which, str(folder / which), json.dumps(runs)]
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the pristine wheels and the patched trees did: `facts` of models, and `runs` of the trainer."""
    folder = tmp_path_factory.mktemp("trees")
    if not unpack(folder / "wheels"):
        pytest.skip("the pinned wheels are not in .cache/wheels; make apply-patches fetches them")
    paths = {"pristine": str(folder / "wheels"), "patched": os.environ.get("PYTHONPATH", "")}
    processes = {which: start(which, folder, path) for which, path in paths.items()}
    done = {}
    for which, process in processes.items():
        output, _ = process.communicate(timeout=280)
        assert process.returncode == 0, output[-3000:]
        facts = json.loads((folder / f"{which}.json").read_text())
        done[which] = {"facts": facts, "runs": torch.load(folder / f"{which}.pt", weights_only=True)}
    assert done["patched"]["runs"]["patched"] and not done["pristine"]["runs"]["patched"]
    return done


# Generation


@pytest.mark.slow
@pytest.mark.parametrize("model", [f"{family} {dtype}" for family in WITH_STREAMS for dtype in ("float32", "bfloat16")])
def test_everything_off_is_upstream_bit_for_bit(trees, model):
    pristine, patched = (trees[which]["facts"][model] for which in ("pristine", "patched"))
    assert pristine.keys() == patched.keys()
    different = [name for name in pristine if name != "default generation config" and pristine[name] != patched[name]]
    assert not different


@pytest.mark.slow
@pytest.mark.parametrize("model", [f"{family} float32" for family in WITH_STREAMS])
def test_saved_configurations_hold_no_field_of_ours(trees, model):
    for name in ("config.json", "generation_config.json"):
        assert not any(word in trees["patched"]["facts"][model][name] for word in OURS)
    name = "default generation config"
    pristine, patched = (json.loads(trees[which]["facts"][model][name]) for which in ("pristine", "patched"))
    added = patched.keys() - pristine.keys()
    assert {key: patched[key] for key in pristine} == pristine
    assert all(patched[key] is None for key in added), "a field of ours has a value by default"


def sampled(model, **overrides):
    """A rollout of two groups of three with scores, and the random state behind it."""
    arguments = {
        **left_padded([5, 9]),
        "tokenizer": small_tokenizer(),
        "do_sample": True,
        "num_return_sequences": 3,
        "max_new_tokens": 25,
        "top_k": 0,
        "eos_token_id": [2, 60, 61],
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    torch.manual_seed(5)
    output = model.generate(**(arguments | overrides))
    return output, torch.get_rng_state()


@pytest.mark.all_families
@pytest.mark.parametrize("phase", ["thinking", "all"])
def test_lambda_zero_is_the_mode_without_cross_path_bit_for_bit(family, phase):
    model = family(**LIVELY)
    off, zero_state = M3POGenerationState(), M3POGenerationState()
    plain, plain_rng = sampled(model)
    recorded, recorded_rng = sampled(model, m3po=off)
    zero, zero_rng = sampled(model, m3po=zero_state, enable_cross_path=True, cross_path_lambda=0.0,
                             cross_path_phase=phase)  # fmt: skip
    blended, _ = sampled(model, enable_cross_path=True, cross_path_lambda=0.3, cross_path_phase=phase)
    for output, rng in ((recorded, recorded_rng), (zero, zero_rng)):
        assert torch.equal(output.sequences, plain.sequences) and torch.equal(rng, plain_rng)
        assert all(torch.equal(a, b) for a, b in zip(output.scores, plain.scores, strict=True))
    assert torch.equal(zero_state.rollout_logps, off.rollout_logps)
    assert not torch.equal(blended.sequences, plain.sequences), "the test cannot tell"


def test_a_forward_without_bags_gets_the_very_embeddings_of_upstream(tiny_llama, monkeypatch):
    model, seen = tiny_llama(), []
    original = hooks.mix_thinking_inputs

    def watched(base, inputs_embeds, kwargs):
        seen.append((inputs_embeds, original(base, inputs_embeds, kwargs)))
        return seen[-1][1]

    monkeypatch.setattr(hooks, "mix_thinking_inputs", watched)
    model(torch.full((2, 4), 130))
    assert len(seen) == 1 and seen[0][0] is seen[0][1]


# Training


@pytest.fixture
def results(trees: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The runs of both trees. They score with one plain class: upstream's only scoring function needs a GPU."""
    return {which: tree["runs"] for which, tree in trees.items()}


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours["tokens"] == theirs["tokens"]
    assert ours["losses"] == theirs["losses"]
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, weight in theirs["weights"].items():
        assert torch.equal(ours["weights"][name], weight), name
    assert torch.equal(ours["rng"], theirs["rng"])


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_lambda_zero_has_the_tokens_losses_weights_and_random_state_of_the_control(results: dict[str, Any], run: str):
    assert_same(results["patched"][f"zero: {run}"], results["patched"][f"none: {run}"])


@pytest.mark.slow
@pytest.mark.parametrize("run", WITH_THOUGHTS)
def test_h3po_at_lambda_zero_is_hrpo(results: dict[str, Any], run: str):
    ours, plain = (results["patched"][f"{variant}: {run}"] for variant in ("hrpo", "none"))
    assert_same(results["patched"][f"zero, thoughts: {run}"], ours)
    assert sum("thinking_residual" in name for name in ours["weights"]) == 5
    assert ours["tokens"] != plain["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_mode_none_has_the_tokens_losses_weights_and_random_state_of_upstream(results: dict[str, Any], run: str):
    assert_same(results["patched"][f"none: {run}"], results["pristine"][f"pristine: {run}"])


@pytest.mark.slow
def test_upstreams_flags_keep_their_names_order_and_defaults(results: dict[str, Any]):
    ours = {field.name for field in dataclasses.fields(M3POArguments)}
    patched = [(name, default) for name, default in results["patched"]["defaults"].items() if name not in ours]
    assert patched == list(results["pristine"]["defaults"].items())
    assert not ours & set(results["pristine"]["defaults"])


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_the_runs_compared_sampled_stopped_and_learned(results: dict[str, Any], run: str):
    control = results["patched"][f"none: {run}"]
    lengths = [len(ids) for ids in control["tokens"]]
    assert min(lengths) < max(lengths) and len(set(map(tuple, control["tokens"]))) > len(lengths) // 2
    assert len(set(control["losses"])) == len(control["losses"])
