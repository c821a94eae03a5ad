# SPDX-License-Identifier: Apache-2.0
"""The flags of `GRPOConfig`: help, YAML and command line, what is derived, what is refused."""

from __future__ import annotations

import dataclasses
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from trl import GRPOConfig, TrlParser
from trl.trainer.m3po.config import M3POArguments

OURS = {field.name: field for field in dataclasses.fields(M3POArguments)}


def config(**flags: Any) -> GRPOConfig:
    return GRPOConfig(output_dir="unused", use_cpu=True, bf16=False, report_to="none", **flags)


def parse(tmp_path: Path, text: str = "{}", *argv: str) -> GRPOConfig:
    """The config that the parser of TRL makes of a YAML file and a command line."""
    file = tmp_path / "run.yaml"
    file.write_text(f"output_dir: unused\nuse_cpu: true\nbf16: false\nreport_to: none\n{text}\n", encoding="utf-8")
    (parsed,) = TrlParser(GRPOConfig).parse_args_and_config(["--config", str(file), *argv])
    return parsed


@pytest.mark.parametrize("name", OURS)
def test_every_flag_has_a_help_text_of_a_sentence(name: str):
    help_text = OURS[name].metadata["help"]
    assert len(help_text.split()) >= 6 and help_text.rstrip()[-1] in ".)", help_text


def test_the_flags_are_the_ones_of_the_design_with_its_defaults():
    assert {name: field.default for name, field in OURS.items()} == {
        "mode": None,
        "enable_cross_path": None,
        "thinking_residual_enabled": None,
        "thinking_residual_r_min": 0.99,
        "thinking_residual_r_max": 0.999,
        "thinking_residual_gate_learning_rate": 1e-4,
        "thinking_residual_lambda_learning_rate": 1e-3,
        "thought_top_k": 64,
        "cross_path_lambda": 0.1,
        "cross_path_temp": None,
        "cross_path_phase": "thinking",
        "cross_path_top_k": None,
        "answer_start": "####",
        "gating_type": "baseline",
        "gating_config": None,
        "gating_training": "embeddings",
        "gating_learning_rate": 1e-3,
        "gating_warmup_steps": 0,
        "rollout_engine": "generate",
        "shared_prefix": "false",
        "blend_kl_steps": 0,
        "aslr_enabled": None,
        "aslr_num_paths": None,
        "aslr_max_iterations": None,
        "aslr_threshold": None,
        "aslr_gumbel_temp": None,
        "aslr_cross_path_lambda": None,
        "aslr_cross_path_temp": None,
    }
    assert config().mode == "none" and config().enable_cross_path is False


VALUES = [
    ("mode", "none", "none"),
    ("mode", "m3po", "m3po"),
    ("mode", "hrpo", "hrpo"),
    ("mode", "h3po", "h3po"),
    ("rollout_engine", "generate", "generate"),
    ("shared_prefix", "auto", "auto"),
    ("blend_kl_steps", "4", 4),
    ("shared_prefix", "true", "true"),
    ("shared_prefix", "false", "false"),
    ("thinking_residual_enabled", "true", True),
    ("thinking_residual_enabled", "false", False),
    ("thinking_residual_r_min", "0.95", 0.95),
    ("thinking_residual_r_max", "0.9995", 0.9995),
    ("thinking_residual_gate_learning_rate", "3.0e-5", 3e-5),
    ("thinking_residual_lambda_learning_rate", "0.002", 0.002),
    ("thought_top_k", "0", 0),
    ("enable_cross_path", "true", True),
    ("enable_cross_path", "false", False),
    ("cross_path_lambda", "0.25", 0.25),
    ("cross_path_temp", "0.5", 0.5),
    ("cross_path_temp", "match", "match"),
    ("cross_path_phase", "all", "all"),
    ("cross_path_top_k", "3", 3),
    ("answer_start", "ANSWER", "ANSWER"),
    ("gating_type", "baseline", "baseline"),
    ("gating_config", '{"temperature": 0.3, "debug": true}', {"temperature": 0.3, "debug": True}),
    ("gating_training", "logits", "logits"),
    ("gating_learning_rate", "5e-4", 5e-4),
    ("gating_warmup_steps", "20", 20),
    ("aslr_enabled", "true", True),
    ("aslr_num_paths", "6", 6),
    ("aslr_max_iterations", "0", 0),
    ("aslr_threshold", "0.25", 0.25),
    ("aslr_gumbel_temp", "0", 0.0),
    ("aslr_cross_path_lambda", "0.75", 0.75),
    ("aslr_cross_path_temp", "0.5", 0.5),
]


# What else must be set for a flag to do anything.
NEEDS = dict.fromkeys(("gating_training", "gating_warmup_steps"), "gating_type: luong")


@pytest.mark.parametrize(("name", "text", "value"), VALUES)
def test_every_flag_is_read_from_the_command_line(tmp_path: Path, name: str, text: str, value: Any):
    assert getattr(parse(tmp_path, NEEDS.get(name, "seed: 3"), f"--{name}", text), name) == value


@pytest.mark.parametrize(("name", "text", "value"), VALUES)
def test_every_flag_is_read_from_yaml_and_the_command_line_wins(tmp_path: Path, name: str, text: str, value: Any):
    yaml = f"{name}: {text}\n{NEEDS.get(name, '')}"
    assert getattr(parse(tmp_path, yaml), name) == value
    assert parse(tmp_path, f"{yaml}\nseed: 3", "--seed", "4").seed == 4


def test_blended_output_distributions_have_no_residual_gate_to_train():
    with pytest.raises(ValueError, match="^gating_training='logits' scores plain tokens.*set gating_training='embed"):
        config(mode="h3po", gating_type="luong", gating_training="logits")


def test_the_size_of_a_learnable_gate_is_filled_in_and_other_options_stay():
    made = config(mode="m3po", gating_type="luong", gating_config={"temperature": 0.3})
    assert made.gating_config == {"temperature": 0.3, "rank": 128, "project_embeddings": False}
    assert config(mode="m3po", gating_type="raw_dot").gating_config is None


def test_every_flag_is_among_the_parsed_ones():
    assert {name for name, _, _ in VALUES} == set(OURS)


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        ({}, "none"),
        ({"mode": "none"}, "none"),
        ({"mode": "m3po"}, "m3po"),
        ({"enable_cross_path": True}, "m3po"),
        ({"enable_cross_path": False}, "none"),
        ({"mode": "m3po", "enable_cross_path": True}, "m3po"),
        ({"mode": "none", "enable_cross_path": False}, "none"),
        ({"enable_cross_path": True, "thinking_residual_enabled": True}, "h3po"),
        ({"enable_cross_path": True, "thinking_residual_enabled": False}, "m3po"),
        ({"enable_cross_path": False, "thinking_residual_enabled": True}, "hrpo"),
        ({"thinking_residual_enabled": True}, "hrpo"),
        ({"enable_cross_path": False, "thinking_residual_enabled": False}, "none"),
        ({"thinking_residual_enabled": False}, "none"),
    ],
)
def test_mode_and_the_two_switches_are_derived_from_each_other(given: dict[str, Any], mode: str):
    made = config(**given)
    assert made.mode == mode
    assert (made.enable_cross_path, made.thinking_residual_enabled) == SWITCHES[mode]


SWITCHES = {"none": (False, False), "m3po": (True, False), "hrpo": (False, True), "h3po": (True, True)}


@pytest.mark.parametrize("crosses", [None, False, True])
@pytest.mark.parametrize("thinks", [None, False, True])
@pytest.mark.parametrize("mode", SWITCHES)
def test_a_contradiction_of_mode_and_a_switch_is_an_error(mode: str, crosses: bool | None, thinks: bool | None):
    given = {"enable_cross_path": crosses, "thinking_residual_enabled": thinks}
    wrong = [
        f"{name}={value}"
        for (name, value), right in zip(given.items(), SWITCHES[mode], strict=True)
        if value not in (None, right)
    ]
    if wrong:
        with pytest.raises(ValueError, match=f"^mode='{mode}' and {wrong[0]} contradict each other; set mode alone.$"):
            config(mode=mode, **given)
    else:
        made = config(mode=mode, **given)
        assert (made.enable_cross_path, made.thinking_residual_enabled) == SWITCHES[mode]


# What is given besides mode="m3po", and how the one line of the error begins and ends: the flag, and the mend.
REFUSED = [
    ({"mode": "mp3o"}, "mode='mp3o'", "set one of none, m3po"),
    ({"thought_top_k": -1}, "thought_top_k=-1", "or 0 for the whole vocabulary"),
    (
        {"thinking_residual_r_min": 0.9, "thinking_residual_r_max": 0.8},
        "thinking_residual_r_min=0.9 and thinking_residual_r_max=0.8",
        "0 < r_min <= r_max < 1",
    ),
    ({"thinking_residual_r_min": 0.0}, "thinking_residual_r_min=0.0", "0 < r_min <= r_max < 1"),
    ({"thinking_residual_r_max": 1.0}, "thinking_residual_r_min=0.99 and thinking_residual_r_max=1.0", "r_max < 1"),
    (
        {"thinking_residual_gate_learning_rate": -1e-4},
        "thinking_residual_gate_learning_rate=-0.0001 is below 0",
        "1e-4 for the residual gate",
    ),
    (
        {"thinking_residual_lambda_learning_rate": float("nan")},
        "thinking_residual_lambda_learning_rate=nan is below 0",
        "1e-3 for Lambda",
    ),
    ({"cross_path_lambda": -0.1}, "cross_path_lambda=-0.1", "outside [0, 1]; the paper uses 0.1"),
    ({"cross_path_lambda": 1.5}, "cross_path_lambda=1.5", "outside [0, 1]; the paper uses 0.1"),
    ({"cross_path_lambda": float("nan")}, "cross_path_lambda=nan", "outside [0, 1]; the paper uses 0.1"),
    ({"cross_path_temp": 0.0}, "cross_path_temp=0.0", "not above 0; the paper uses 0.1"),
    ({"cross_path_temp": -1.0}, "cross_path_temp=-1.0", "not above 0; the paper uses 0.1"),
    ({"gating_config": {"temperature": 0}}, "cross_path_temp=0", "not above 0; the paper uses 0.1"),
    ({"cross_path_phase": "answer"}, "cross_path_phase='answer'", "set one of thinking, all"),
    ({"cross_path_top_k": 0}, "cross_path_top_k=0", "set 1 or more, or leave it out"),
    ({"gating_type": "cosine"}, "gating_type='cosine'", "set one of bahdanau, baseline"),
    ({"cross_path_temp": "sharp"}, "cross_path_temp='sharp'", "neither a number above 0 nor 'match'"),
    ({"gating_training": "both"}, "gating_training='both'", "set one of embeddings, logits"),
    ({"gating_training": "logits"}, "gating_training='logits' does nothing", "set gating_type='luong' or 'bahdanau'"),
    ({"gating_warmup_steps": 3}, "gating_warmup_steps=3 does nothing", "set gating_type='luong' or 'bahdanau'"),
    ({"gating_warmup_steps": -1, "gating_type": "luong"}, "gating_warmup_steps=-1", "0 is none"),
    ({"gating_learning_rate": -0.1}, "gating_learning_rate=-0.1", "default is 1e-3"),
    ({"gating_type": "luong", "gating_config": {"rank": 0}}, "gating_config rank=0", "the default is 128"),
    ({"gating_type": "raw_dot", "gating_config": {"rank": 8}}, "gating_config has no option 'rank'", "debug"),
    (
        {"gating_type": "bahdanau", "gating_config": {"project_embeddings": "yes"}},
        "gating_config project_embeddings='yes'",
        "true or false",
    ),
    ({"answer_start": ""}, "answer_start is empty", "set the text that opens the answer"),
    ({"gating_config": {"temprature": 1}}, "gating_config", "takes temperature and debug"),
    (
        {"cross_path_temp": 0.2, "gating_config": {"temperature": 0.3}},
        "cross_path_temp=0.2 and gating_config temperature=0.3",
        "set one of them",
    ),
    ({"aslr_num_paths": 0}, "aslr_num_paths=0 is no whole number from 1 on", "4."),
    ({"aslr_num_paths": 2.5}, "aslr_num_paths=2.5 is no whole number from 1 on", "4."),
    ({"aslr_max_iterations": -1}, "aslr_max_iterations=-1 is no whole number from 0 on", "2."),
    ({"aslr_threshold": 1.1}, "aslr_threshold=1.1 is outside [0, 1]", "0.5."),
    ({"aslr_threshold": float("nan")}, "aslr_threshold=nan is outside [0, 1]", "0.5."),
    ({"aslr_gumbel_temp": -0.1}, "aslr_gumbel_temp=-0.1 is not 0 or a positive number", "1.0."),
    ({"aslr_gumbel_temp": float("inf")}, "aslr_gumbel_temp=inf is not 0 or a positive number", "1.0."),
    ({"aslr_cross_path_lambda": -0.1}, "aslr_cross_path_lambda=-0.1 is outside [0, 1]", "0.1."),
    ({"aslr_cross_path_lambda": 1.5}, "aslr_cross_path_lambda=1.5 is outside [0, 1]", "0.1."),
    ({"aslr_cross_path_temp": 0.0}, "aslr_cross_path_temp=0.0 is not above 0", "0.1."),
    ({"aslr_cross_path_temp": float("nan")}, "aslr_cross_path_temp=nan is not above 0", "0.1."),
    ({"use_vllm": True}, "use_vllm=True", "use of vLLM does not let paths interact: set rollout_engine='vllm'"),
    (
        {"use_transformers_continuous_batching": True},
        "use_transformers_continuous_batching=True",
        "set it to False",
    ),
    ({"top_k": 50}, "top_k=50", "needs top_k=0"),
    ({"top_p": 0.9}, "top_p=0.9", "needs top_p=1.0"),
    ({"min_p": 0.1}, "min_p=0.1", "needs min_p=0.0"),
    ({"repetition_penalty": 1.1}, "repetition_penalty=1.1", "needs repetition_penalty=1.0"),
    ({"generation_kwargs": {"stop_strings": ["a"]}}, "generation_kwargs has stop_strings", "Leave it out"),
    ({"cache_implementation": "quantized"}, "cache_implementation='quantized'", "leave it out"),
    ({"generation_kwargs": {"cache_implementation": "quantized"}}, "cache_implementation='quantized'", "leave it out"),
    ({"generation_kwargs": {"top_k": 50}}, "top_k=50", "needs top_k=0"),
    ({"generation_kwargs": {"top_p": 0.9}}, "top_p=0.9", "needs top_p=1.0"),
    ({"generation_kwargs": {"min_p": 0.1}}, "min_p=0.1", "needs min_p=0.0"),
    ({"generation_kwargs": {"repetition_penalty": 1.2}}, "repetition_penalty=1.2", "needs repetition_penalty=1.0"),
    ({"generation_kwargs": {"num_beams": 2}}, "num_beams=2", "set num_beams=1"),
    ({"generation_kwargs": {"temperature": 0.5}}, "generation_kwargs has temperature", "Leave it out"),
    ({"generation_kwargs": {"typical_p": 0.9}}, "generation_kwargs has typical_p", "Leave it out"),
    (
        {"per_device_train_batch_size": 4, "num_generations": 8, "generation_batch_size": 8, "world": 2},
        "per_device_train_batch_size * steps_per_generation = 4 * 1 = 4",
        "set per_device_train_batch_size to 8, or set generation_batch_size to 16",
    ),
    (
        {"per_device_train_batch_size": 7, "steps_per_generation": 4, "num_generations": 8, "world": 2},
        "per_device_train_batch_size * steps_per_generation = 7 * 4 = 28",
        "set per_device_train_batch_size to 6 or 8, or set generation_batch_size to 112",
    ),
    (
        {"eval_strategy": "steps", "per_device_eval_batch_size": 6, "num_generations_eval": 4, "world": 2},
        "per_device_eval_batch_size=6",
        "set it to 4 or 8",
    ),
    (
        {"eval_strategy": "epoch", "per_device_eval_batch_size": 4, "world": 2},
        "per_device_eval_batch_size=4",
        "set it to 8",
    ),
    (
        {"gating_type": "luong", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "world": 1},
        "per_device_train_batch_size=4 does not hold whole groups of num_generations=8",
        "Set it to 8, with gradient_accumulation_steps",
    ),
]


def refused_config(monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], mode: str) -> str:
    """The text of the error, with `world` processes."""
    flags = dict(flags)
    monkeypatch.setattr(GRPOConfig, "world_size", flags.pop("world", 1))
    with pytest.raises(ValueError) as caught:
        config(**{"mode": mode, **flags})
    return str(caught.value)


@pytest.mark.parametrize("mode", ["m3po", "h3po"])
@pytest.mark.parametrize(("flags", "start", "mend"), REFUSED, ids=[start for _, start, _ in REFUSED])
def test_bad_input_gets_one_line_with_the_flag_and_the_mend(
    monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], start: str, mend: str, mode: str
):
    said = refused_config(monkeypatch, flags, mode)
    assert said.startswith(start) and mend in said and "\n" not in said, said


GROUPS = [case for case in REFUSED if "world" in case[0]]
NUMBERS, FEATURES = REFUSED[1:39], [case for case in REFUSED[39:] if case not in GROUPS]


@pytest.mark.parametrize("mode", ["none", "hrpo"])
@pytest.mark.parametrize(("flags", "start", "mend"), NUMBERS, ids=[start for _, start, _ in NUMBERS])
def test_a_control_fails_like_its_pair_on_a_mistyped_number(
    monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], start: str, mend: str, mode: str
):
    said = refused_config(monkeypatch, flags, mode)
    assert said.startswith(start) and mend in said, said


@pytest.mark.parametrize(("flags", "start", "mend"), FEATURES, ids=[start for _, start, _ in FEATURES])
def test_without_peers_a_rollout_needs_upstreams_loop_and_distribution_too(
    monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], start: str, mend: str
):
    said = refused_config(monkeypatch, flags, "hrpo")
    assert said.startswith(start) and "\n" not in said, said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            {"use_vllm": True},
            "use_vllm=True cannot be combined with aslr_enabled=True: TRL's use of vLLM does not have such modules.",
        ),
        (
            {"use_transformers_continuous_batching": True},
            "use_transformers_continuous_batching=True cannot be combined with aslr_enabled=True: set it to False.",
        ),
    ],
    ids=["vLLM", "continuous batching"],
)
def test_aslr_needs_upstreams_loop_in_the_control_too(
    monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], said: str
):
    assert refused_config(monkeypatch, {"aslr_enabled": True, **flags}, "none") == said
    for mode in ("m3po", "hrpo", "h3po"):  # there the mode is named, which needs it as much
        assert f"mode='{mode}'" in refused_config(monkeypatch, {"aslr_enabled": True, **flags}, mode)


@pytest.mark.parametrize("mode", ["none", "m3po"])
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"rollout_engine": "sglang"}, "rollout_engine='sglang' is unknown; set one of generate, vllm."),
        ({"aslr_enabled": True}, "aslr_enabled=True cannot be combined with rollout_engine='vllm': set False."),
        ({"vllm_mode": "server"}, "vllm_mode='server' cannot be combined with rollout_engine='vllm': set 'colocate'."),
        (
            {"vllm_tensor_parallel_size": 2},
            "vllm_tensor_parallel_size=2 cannot be combined with rollout_engine='vllm': set 1.",
        ),
        (
            {"vllm_structured_outputs_regex": "a+"},
            "vllm_structured_outputs_regex='a+' cannot be combined with rollout_engine='vllm': set None.",
        ),
    ],
)
def test_what_vllm_cannot_roll_out_is_one_line(
    monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], said: str, mode: str
):
    assert refused_config(monkeypatch, {"rollout_engine": "vllm", **flags}, mode) == said


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_its_rollouts_are_refused_before_any_work(monkeypatch: pytest.MonkeyPatch):
    said = refused_config(monkeypatch, {"rollout_engine": "vllm"}, "none")
    assert said == "rollout_engine='vllm' needs vllm, which is not installed: make env EXTRA=vllm."


def test_aslr_in_the_control_may_cut_the_distribution_and_split_groups_as_upstream_does(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(GRPOConfig, "world_size", 2)
    flags = {"top_k": 5, "top_p": 0.9, "per_device_train_batch_size": 2, "num_generations": 4}
    assert config(aslr_enabled=True, **flags).aslr_enabled


@pytest.mark.parametrize("flags", [flags for flags, _, _ in GROUPS], ids=[start for _, start, _ in GROUPS])
def test_without_peers_a_group_may_lie_on_two_processes(monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any]):
    flags = dict(flags)
    monkeypatch.setattr(GRPOConfig, "world_size", flags.pop("world"))
    assert config(mode="hrpo", **flags).mode == "hrpo"


@pytest.mark.parametrize("flags", [flags for flags, _, _ in FEATURES[2:] + GROUPS])
def test_a_control_may_do_what_upstream_may(monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any]):
    flags = dict(flags)
    monkeypatch.setattr(GRPOConfig, "world_size", flags.pop("world", 1))
    assert config(**flags).mode == "none"


@pytest.mark.parametrize(
    ("world", "group", "rows", "steps"), [(2, 8, 4, 1), (2, 8, 7, 4), (4, 8, 9, 2), (3, 6, 4, 2), (8, 8, 3, 3)]
)
def test_the_numbers_that_an_error_offers_work(
    monkeypatch: pytest.MonkeyPatch, world: int, group: int, rows: int, steps: int
):
    given = {"mode": "m3po", "num_generations": group, "per_device_train_batch_size": rows}
    said = refused_config(monkeypatch, {**given, "steps_per_generation": steps, "world": world}, "m3po")
    offers = dict(re.findall(r"set (\w+) to (\d+(?: or \d+)?)", said))
    for value in offers["per_device_train_batch_size"].split(" or "):
        assert config(**{**given, "per_device_train_batch_size": int(value)}, steps_per_generation=steps)
    for value in offers["generation_batch_size"].split(" or "):
        assert config(**given, generation_batch_size=int(value))


@pytest.mark.parametrize(
    "flags",
    [
        {"top_k": 0, "top_p": 1.0, "min_p": None, "repetition_penalty": 1.0},
        {"generation_kwargs": {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "num_beams": 1}},
        {"cross_path_lambda": 0.0},
        {"cross_path_lambda": 1.0, "cross_path_temp": 0.3, "gating_config": {"temperature": 0.3}},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_generations": 4},
        {"eval_strategy": "steps", "per_device_eval_batch_size": 6, "num_generations_eval": 3},
    ],
)
def test_what_is_legal_passes(flags: dict[str, Any]):
    assert config(mode="m3po", **flags).mode == "m3po"
