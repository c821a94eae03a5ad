# SPDX-License-Identifier: Apache-2.0
"""Everything off is upstream, and λ = 0 is the mode without cross-path, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from reference.tiny import LIVELY, left_padded, small_tokenizer
from transformers.m3po import M3POGenerationState, hooks

ROOT = Path(__file__).resolve().parents[2]
OURS = "cross_path", "gating", "answer_start", "thinking", "m3po", "mhc"
FAMILIES = "Llama", "Qwen2", "NanoChat"


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """What the pristine wheel and the patched package do, from one process each, side by side."""
    wheels = sorted((ROOT / ".cache" / "wheels").glob("transformers-*.whl"))
    if len(wheels) != 1:
        pytest.skip("the pinned wheel of transformers is not in .cache/wheels; make apply-patches fetches it")
    pristine = tmp_path_factory.mktemp("pristine")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(pristine)
    processes = {}
    for which, path in (("pristine", str(pristine)), ("patched", os.environ.get("PYTHONPATH", ""))):
        processes[which] = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "reference" / "upstream_facts.py"), which],
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    found = {}
    for which, process in processes.items():
        out, err = process.communicate(timeout=250)
        assert process.returncode == 0, err[-2000:]
        found[which] = json.loads(out)
    return found


@pytest.mark.parametrize("model", [f"{family} {dtype}" for family in FAMILIES for dtype in ("float32", "bfloat16")])
def test_everything_off_is_upstream_bit_for_bit(facts, model):
    pristine, patched = facts["pristine"][model], facts["patched"][model]
    assert pristine.keys() == patched.keys()
    generated = {"default generation config"}
    different = [name for name in pristine if name not in generated and pristine[name] != patched[name]]
    assert not different


@pytest.mark.parametrize("model", [f"{family} float32" for family in FAMILIES])
def test_saved_configurations_hold_no_field_of_ours(facts, model):
    for name in ("config.json", "generation_config.json"):
        assert not any(word in facts["patched"][model][name] for word in OURS)
    pristine, patched = (json.loads(facts[which][model]["default generation config"]) for which in facts)
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


@pytest.mark.both_families
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
