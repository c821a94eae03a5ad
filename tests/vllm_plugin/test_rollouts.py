# SPDX-License-Identifier: Apache-2.0
"""With the same random numbers an engine's tokens, bags and log-probs are those of `generate`, in every mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from m3po_vllm import engine_arguments
from m3po_vllm.requests import GROUP, PATHS, RECORD
from reference.tiny import small_tokenizer
from transformers.m3po import M3POGenerationState
from transformers.m3po.settings import ThinkingSettings
from trl import ModelConfig
from vllm_engine import EOS, LENGTH, PATHS_OF_A_GROUP, checkpoint, generate, prompts, table, thinking_params

from m3po_lab.models.loading import load_model

# Family, mode and numbers, so that every family meets every mode or another gate somewhere.
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "m3po", {}),
    ("llama", "hrpo", {}),
    ("llama", "h3po", {"gating_type": "bhattacharyya"}),
    ("qwen2", "m3po", {"gating_type": "kl_divergence", "cross_path_temp": "match"}),
    ("qwen2", "hrpo", {"thought_top_k": 0, "cross_path_phase": "all"}),
    ("qwen3", "h3po", {"cross_path_top_k": 1}),
    ("qwen3", "m3po", {"gating_type": "shuffled"}),
]
LAMBDA = 0.3


def settings_of(mode: str, given: dict[str, Any]) -> ThinkingSettings:
    return ThinkingSettings(mode=mode, cross_path_lambda=LAMBDA, **given)


def dense(record: Any, vocabulary: int) -> torch.Tensor:
    """(B, T, V), the bags of a record as weights of all tokens: entries of equal weight may stand in any order."""
    zeros = torch.zeros(*record.bag_ids.shape[:2], vocabulary)
    return zeros.scatter_add(-1, record.bag_ids.long(), record.bag_weights)


def largest_difference(records: list[Any], expected: Any) -> dict[str, float]:
    """Between the groups of an engine and the rows of `generate`, of log-probs and weights; masks are equal."""
    found = {"logps": 0.0, "weights": 0.0}
    for number, record in enumerate(records):
        rows = expected.rows(slice(number * PATHS_OF_A_GROUP, (number + 1) * PATHS_OF_A_GROUP)).pad(LENGTH)
        record = record.pad(LENGTH)
        assert torch.equal(record.thinking_mask, rows.thinking_mask)
        vocabulary = 1 + max(int(record.bag_ids.max()), int(rows.bag_ids.max()))
        found["logps"] = max(found["logps"], float((record.logps - rows.logps).abs().max()))
        found["weights"] = max(
            found["weights"], float((dense(record, vocabulary) - dense(rows, vocabulary)).abs().max())
        )
    return found


@pytest.mark.parametrize(("kind", "mode", "given"), CASES)
def test_tokens_bags_and_log_probs_are_those_of_generate(
    engines: Any, tmp_path: Path, kind: str, mode: str, given: dict[str, Any]
) -> None:
    model, settings, numbers = checkpoint(tmp_path, kind, mode), settings_of(mode, given), table(3)
    tokens, expected = generate(model, settings, prompts(), numbers)
    assert len(set(map(len, tokens))) > 2 and max(map(len, tokens)) == LENGTH, "the paths end alike"
    assert expected.bag_weights is not None and int((expected.bag_weights > 0).any(-1).sum()) > 50
    engine = engines(tmp_path, type(model).__name__, settings)
    written, records, _ = engine.roll_out(prompts(), numbers)
    assert written == tokens
    difference = largest_difference(records, expected)
    assert difference["logps"] < 1e-4 and difference["weights"] < 1e-4, difference


def test_what_is_left_out_or_exchanged_is_seen(engines: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above can fail: without the inputs, with a peer's row in place of another, with a group split."""
    model, settings, numbers = checkpoint(tmp_path, "llama", "m3po"), settings_of("m3po", {}), table(3)
    tokens, expected = generate(model, settings, prompts(), numbers)
    engine = engines(tmp_path, type(model).__name__, settings)
    rollouts = engine.runner.rollouts

    def difference(first: int) -> float:
        written, records, _ = engine.roll_out(prompts(), numbers, first)
        if written != tokens:
            return float("inf")
        return largest_difference(records, expected)["logps"]

    assert difference(0) < 1e-4
    with monkeypatch.context() as patch:
        patch.setattr(rollouts, "mix", lambda *args: None)
        assert difference(3) > 1e-3
    mix = type(rollouts).mix

    def exchanged(requests: list[str], embeds: torch.Tensor, starts: torch.Tensor) -> None:
        mix(rollouts, requests, embeds, starts)
        if len(starts) > 1:
            embeds[starts[:2]] = embeds[starts[:2].flip(0)]

    with monkeypatch.context() as patch:
        patch.setattr(rollouts, "mix", exchanged)
        assert difference(6) > 1e-3
    with monkeypatch.context() as patch:
        patch.setattr(type(engine.runner), "_newcomer", split(type(engine.runner)._newcomer))
        with pytest.raises(RuntimeError, match=r"group g9 has 3 of 4 paths in this step"):
            engine.roll_out(prompts(), numbers, 9)


def split(newcomer: Any) -> Any:
    """Path 3 of a group is not seen in the step in which the others begin."""
    return lambda runner, request: (
        None if (found := newcomer(runner, request)) is not None and found.tag.path == 3 else found
    )


def test_smollm2_thinks_in_an_engine_as_it_does_in_generate(engines: Any, tmp_path: Path) -> None:
    """The embedded model, on two problems: log-probs to 1e-3, since attention is another kernel."""
    model, tokenizer = load_model(ModelConfig(model_name_or_path="smollm2-135m", dtype="float32"))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    asked = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
        for text in ("What is 34 + 21 + 7?", "Tom has 4 apples and buys 3 more. How many has he?")
    ]
    settings, numbers = settings_of("m3po", {}), table(2)
    tokens, expected = generate(model.eval(), settings, asked, numbers, tokenizer)
    engine = engines(tmp_path, type(model).__name__, settings)
    written, records, _ = engine.roll_out(asked, numbers)
    assert written == tokens
    difference = largest_difference(records, expected)
    assert difference["logps"] < 1e-3 and difference["weights"] < 1e-3, difference
    assert max(float((record.bag_weights[..., 1:] > 0).float().mean()) for record in records) > 0.5


def test_a_greedy_path_thinks_at_the_sampling_temperature_beside_sampled_ones(engines: Any, tmp_path: Path) -> None:
    model, settings = checkpoint(tmp_path, "llama", "hrpo"), settings_of("hrpo", {})
    state = M3POGenerationState(settings=settings, tokenizer=small_tokenizer(), thought_temperature=0.7)
    prompt = torch.tensor(prompts()[:1])
    written = model.generate(
        input_ids=prompt, m3po=state, do_sample=False, max_new_tokens=LENGTH, eos_token_id=EOS, pad_token_id=0
    )
    ours = engine_arguments(settings.hyperparameters(), type(model).__name__, sampling_temperature=0.7)
    engine = engines(tmp_path, type(model).__name__, settings, additional_config=ours["additional_config"])
    greedy = thinking_params({PATHS: 1, GROUP: "greedy"}, temperature=0.0)
    sampled = thinking_params({PATHS: 1, GROUP: "sampled", RECORD: False})
    asked = [{"prompt_token_ids": prompts()[0]}] * 2
    outputs = engine.llm.generate(asked, [sampled, greedy], use_tqdm=False)
    assert list(outputs[1].outputs[0].token_ids) == written[0, prompt.shape[1] :].tolist()
    assert largest_difference([engine.record("greedy")], state.record)["weights"] < 1e-4
