# SPDX-License-Identifier: Apache-2.0
"""Groups stay in step where seats and cache are scarce, beside plain requests, and when a path is taken back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from m3po_vllm.requests import GROUP, PATH
from transformers.m3po.settings import ThinkingSettings
from vllm import SamplingParams
from vllm_engine import EOS, LENGTH, PATHS_OF_A_GROUP, checkpoint, generate, prompts, table, thinking_params

SETTINGS = ThinkingSettings(mode="m3po", cross_path_lambda=0.3)
ALONE = (3, 5, 6, 8, 4)


def plain(engine: Any, asked: list[list[int]]) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=LENGTH, stop_token_ids=EOS)
    outputs = engine.llm.generate([{"prompt_token_ids": one} for one in asked], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize(
    "scarce",
    [
        {},
        {"max_num_seqs": 6},  # a group and two plain ones
        {"max_num_batched_tokens": 40, "max_model_len": 40, "max_num_seqs": 40},  # the prompts of a group
        {"num_gpu_blocks_override": 7},  # a block is 128 tokens: a row each
    ],
    ids=["room", "seats", "tokens", "blocks"],
)
def test_groups_are_whole_where_room_is_scarce_and_plain_requests_are_plain(
    engines: Any, tmp_path: Path, scarce: dict[str, int]
) -> None:
    model, numbers = checkpoint(tmp_path, "llama", "m3po"), table(3)
    tokens, expected = generate(model, SETTINGS, prompts(), numbers)
    engine = engines(tmp_path, type(model).__name__, SETTINGS, **scarce)
    alone = prompts(ALONE)
    written, records, told = engine.roll_out(prompts(), numbers, plain=alone)
    assert written == tokens
    for number, record in enumerate(records):
        rows = expected.rows(slice(number * PATHS_OF_A_GROUP, (number + 1) * PATHS_OF_A_GROUP)).pad(LENGTH)
        torch.testing.assert_close(record.pad(LENGTH).logps, rows.logps, atol=1e-4, rtol=0)
    median = torch.full((len(alone), LENGTH), 0.5)
    assert told == generate(model, None, alone, median)[0]


def test_a_path_that_is_taken_back_leaves_its_group(engines: Any, tmp_path: Path) -> None:
    """Before the group is admitted, and on its way; the others go on as a group without it."""
    model = checkpoint(tmp_path, "llama", "m3po")
    engine = engines(tmp_path, type(model).__name__, SETTINGS)
    core = engine.llm.llm_engine

    def send(group: str, paths: list[int]) -> None:
        for path in paths:
            params = thinking_params({GROUP: group, PATH: path}, ignore_eos=True, stop_token_ids=[])
            core.add_request(f"{group}/{path}", {"prompt_token_ids": prompts()[0]}, params)

    send("early", [0, 1, 2])
    core.step()
    assert not engine.runner.rollouts.groups, "a group began without its last path"
    core.abort_request(["early/1"])
    send("early", [3])
    send("late", [0, 1, 2, 3])
    for _ in range(5):
        core.step()
    core.abort_request(["late/2"])
    lengths = {}
    while core.has_unfinished_requests():
        for output in core.step():
            lengths[output.request_id] = len(output.outputs[0].token_ids)
    assert set(lengths) == {f"early/{path}" for path in (0, 2, 3)} | {f"late/{path}" for path in (0, 1, 3)}
    assert set(lengths.values()) == {LENGTH}
    early, late = engine.record("early"), engine.record("late")
    assert len(early.logps) == 3 and len(late.logps) == PATHS_OF_A_GROUP
    assert (early.bag_weights[:, 0, 1:] > 0).sum(-1).tolist() == [2, 2, 2]
    heard = (late.bag_weights[0, :, 1:] > 0).sum(-1)  # by path 0: three peers, and two when one has left
    assert heard[:5].tolist() == [3] * 5 and 2 in heard.tolist() and heard[6:].max() == 2
    assert int((late.logps[2] != 0).sum()) < LENGTH


def test_no_request_reads_keys_and_values_that_hang_on_thinking_inputs(engines: Any, tmp_path: Path) -> None:
    """A later prompt that is a group's prompt with one of its completions, long enough for whole cache blocks."""
    model = checkpoint(tmp_path, "llama", "m3po")
    engine = engines(tmp_path, type(model).__name__, SETTINGS, max_model_len=256, max_num_batched_tokens=1024)
    prompt = prompts([120])[0]
    numbers = table(1)
    written, _, _ = engine.roll_out([prompt], numbers)
    longest = max(written, key=len)
    asked = prompt + longest
    assert len(asked) > 128, "no block of the cache is full"
    expected = model.generate(input_ids=torch.tensor([asked]), do_sample=False, max_new_tokens=8, eos_token_id=EOS)
    assert plain(engine, [asked])[0][:8] == expected[0, len(asked) :].tolist()[:8]
    assert plain(engine, [asked])[0][:8] == expected[0, len(asked) :].tolist()[:8], "from its own cache"


@pytest.mark.parametrize(
    ("given", "tag", "message"),
    [
        ({"top_p": 0.9}, {GROUP: "g", PATH: 0}, r"top_p cannot be combined with thinking inputs: leave it at 1\.0"),
        ({"top_k": 5}, {GROUP: "g", PATH: 0}, "top_k cannot be combined"),
        ({"stop": ["x"]}, {GROUP: "g", PATH: 0}, "stop cannot be combined"),
        ({"repetition_penalty": 1.1}, {GROUP: "g", PATH: 0}, "repetition_penalty cannot be combined"),
        ({}, {"m3po_paths": -1}, "m3po_paths=-1 is no whole number from 0 on"),
        ({"n": 2}, {}, "m3po_paths=4 of a request with n=2"),
        ({}, {GROUP: "g", PATH: "x"}, "m3po_path='x' is none of the 4 paths of a group"),
        ({}, {GROUP: "g", PATH: 4}, "m3po_path=4 is none of the 4 paths of a group"),
        ({"n": 4}, {GROUP: "g", PATH: 0}, "n=4 of a request that says its m3po_group"),
    ],
)
def test_what_cannot_be_served_is_refused_before_it_starts(
    given: dict[str, Any], tag: dict[str, Any], message: str
) -> None:
    from m3po_vllm.requests import Admission

    with pytest.raises(ValueError, match=message):
        Admission.validate_params(thinking_params(tag, **given))


def test_a_group_that_can_never_fit_is_refused_with_the_number_to_raise(engines: Any, tmp_path: Path) -> None:
    model = checkpoint(tmp_path, "llama", "m3po")
    for scarce, message in (
        ({"max_num_seqs": 3}, "4 paths behind a prompt of 4 tokens need 4 max_num_seqs, and this engine has 3"),
        ({"max_num_batched_tokens": 15, "max_model_len": 15, "max_num_seqs": 15}, "need 16 max_num_batched_tokens"),
        (
            {"num_gpu_blocks_override": 4},
            "need 5 blocks of the cache, and this engine has 4: raise VLLM_CPU_KVCACHE_SPACE",
        ),
    ):
        engine = engines(tmp_path, type(model).__name__, SETTINGS, **scarce)
        with pytest.raises(ValueError, match=message):
            engine.roll_out(prompts()[:1], table(1))


def test_paths_of_one_request_are_a_group(engines: Any, tmp_path: Path) -> None:
    model = checkpoint(tmp_path, "llama", "m3po")
    engine = engines(tmp_path, type(model).__name__, SETTINGS)
    outputs = engine.llm.generate(
        [{"prompt_token_ids": one} for one in prompts()], thinking_params({}, n=PATHS_OF_A_GROUP), use_tqdm=False
    )
    groups = engine.runner.rollouts.groups
    assert [len(output.outputs) for output in outputs] == [PATHS_OF_A_GROUP] * 3 and len(groups) == 3
    for output, group in zip(outputs, groups, strict=True):
        record = engine.record(group)
        for path, completion in enumerate(output.outputs):
            own = record.bag_ids[path, : len(completion.token_ids), 0]
            heard = (record.bag_weights[path, : len(completion.token_ids)] > 0).any(-1)
            assert heard.any()
            assert torch.equal(own[heard], torch.tensor(completion.token_ids, dtype=torch.int32)[heard])
