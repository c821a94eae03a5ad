# SPDX-License-Identifier: Apache-2.0
"""Arguments: every YAML of the project parses, wrong ones are one clear line, the command line wins."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import yaml

from m3po_lab.core.config_files import is_study
from m3po_lab.grpo import config
from m3po_lab.train import main

CONFIGS = config.PROJECT_ROOT / "configs"
OTHER_PARSERS = ("accelerate", "eval")
RUN_CONFIGS = sorted(
    path
    for path in CONFIGS.rglob("*.yaml")
    if path.relative_to(CONFIGS).parts[0] not in OTHER_PARSERS and not path.name.startswith(("mhc_", "controller_"))
    if not is_study(path)
)
MODELS = ("llama-3.2-1b", "llama-3.2-3b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen3-0.6b", "qwen3-1.7b")


def write(folder: Path, text: str) -> str:
    file = folder / "some.yaml"
    file.write_text(text)
    return str(file)


def test_all_run_configs_are_found() -> None:
    """A search that finds too few files would let the next test pass on nothing."""
    papers = {f"papers/gsm8k-{model}-{method}.yaml" for model in MODELS for method in ("grpo", "m3po")}
    papers |= {f"papers/{data}-{model}-hrpo.yaml" for data in ("gsm8k", "math", "mmlu") for model in MODELS[2:4]}
    papers.add("papers/gsm8k-qwen2.5-1.5b-h3po.yaml")
    found = {path.relative_to(CONFIGS).as_posix() for path in RUN_CONFIGS}
    assert found == {"demo.yaml", "demo_short.yaml", "studies/chain.yaml", "studies/word_sums.yaml", *papers}


@pytest.mark.parametrize("file", RUN_CONFIGS, ids=lambda path: path.stem)
def test_run_config_parses_with_numbers_of_the_right_type(file: Path) -> None:
    """YAML reads 1e-5 as text; the parser mends that where a field is one float, but not in a list of them."""
    run = config.parse_run([str(file)])
    hints: dict[str, Any] = {}
    for group in (run.script, run.training, run.model):
        hints.update({spec.name: (get_type_hints(type(group))[spec.name], group) for spec in dataclasses.fields(group)})
    keys = yaml.safe_load(file.read_text())
    assert len(keys) >= 10
    for key in keys:
        hint, group = hints[key]
        allowed = {part for outer in get_args(hint) or (hint,) for part in get_args(outer) or (outer,)}
        if {int, float} & allowed and str not in allowed:
            for value in (keys[key], getattr(group, key)):
                for number in value if isinstance(value, list) else [value]:
                    whole_number = float in allowed and type(number) is int  # 1 for 1.0 is no mistake
                    assert type(number) in allowed or whole_number, (key, value, hint)


@pytest.mark.parametrize("file", RUN_CONFIGS, ids=lambda path: path.stem)
def test_run_config_names_its_command_and_expected_time(file: Path) -> None:
    head = "".join(itertools.takewhile(lambda line: line.startswith("#"), file.read_text().splitlines(keepends=True)))
    assert "bash scripts/train_grpo.sh" in head
    assert "minutes" in head or "Time not measured here." in head


def test_command_line_wins_over_yaml(tmp_path: Path) -> None:
    file = write(tmp_path, "seed: 5\nlearning_rate: 1e-5\nuse_cpu: true\nbf16: false\n")
    run = config.parse_run([file, "--seed", "6"])
    assert (run.training.seed, run.training.learning_rate) == (6, 1e-5)


def test_config_flag_is_the_same_as_the_first_word(tmp_path: Path) -> None:
    file = write(tmp_path, "seed: 5\nuse_cpu: true\nbf16: false\n")
    assert config.parse_run(["--seed", "6", "--config", file]).config_file == Path(file)


def test_project_config_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert config.find_config("configs/demo_short.yaml") == config.PROJECT_ROOT / "configs" / "demo_short.yaml"


def test_run_folder_is_named_by_config_mode_and_seed(tmp_path: Path) -> None:
    run = config.parse_run([write(tmp_path, "use_cpu: true\nbf16: false\nseed: 8\n")])
    assert run.folder == config.PROJECT_ROOT / "runs" / f"some-{run.training.mode}-seed8"


@pytest.mark.parametrize(
    ("yaml_text", "words", "text"),
    [
        ("seed: 1\n", ["--learnin_rate", "1"], "Unknown argument --learnin_rate. Did you mean --learning_rate?"),
        ("seed: 1\n", ["--max_step", "3"], "Unknown argument --max_step. Did you mean --max_steps?"),
        ("seed: 1\n", ["stray"], "Unknown argument stray"),
        ("sead: 1\n", [], "unknown key 'sead'. Did you mean --seed?"),
        ("seed: x\n", [], "argument --seed: invalid int value: 'x'"),
        ("seed: [1\n", [], "some.yaml"),
        ("seed: 1\n", ["--num_generations", "7"], "must be divisible by num_generations"),
        ("seed: 1\n", ["--dataset_config", "[1]"], "--dataset_config = .* must be a mapping"),
        ("seed: 1\n", ["--trust_remote_code", "true"], "--trust_remote_code true is refused"),
        ("seed: 1\n", ["--reward_weights", "1.0"], "--reward_weights"),
    ],
)
def test_wrong_argument_is_one_line_and_exit_code_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], yaml_text: str, words: list[str], text: str
) -> None:
    file = write(tmp_path, "use_cpu: true\nbf16: false\n" + yaml_text)
    with pytest.raises(config.UserError, match=text):
        config.parse_run([file, *words])
    assert main([file, *words]) == 2
    printed = capsys.readouterr().err.strip()
    assert printed.startswith("error: ")
    assert len(printed.splitlines()) == 1


def test_missing_yaml_is_one_line_that_names_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs/nope.yaml"]) == 2
    assert "configs/nope.yaml does not exist" in (printed := capsys.readouterr().err)
    assert "configs/demo.yaml" in printed
    assert "configs/papers/gsm8k-qwen2.5-1.5b-m3po.yaml" in printed and "configs/eval" not in printed
    assert "configs/studies/word_sums.yaml" in printed and "configs/studies/gates.yaml" not in printed


def test_yaml_without_keys_is_refused(tmp_path: Path) -> None:
    with pytest.raises(config.UserError, match="must contain a YAML mapping"):
        config.parse_run([write(tmp_path, "just text\n")])


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--load_in_4bit", "true"], "--load_in_4bit true needs Unsloth, and this run has engine trl"),
        (["--load_in_8bit", "true"], "--load_in_8bit true is refused"),
        (["--dtype", "float99"], "--dtype.*float99.*auto.*bfloat16"),
    ],
)
def test_what_loading_a_model_would_ignore_is_refused(tmp_path: Path, words: list[str], text: str) -> None:
    with pytest.raises(config.UserError, match=text):
        config.parse_run([write(tmp_path, "bf16: false\n"), *words])
    with pytest.raises(config.UserError, match=text):  # from YAML too, where choices are not checked
        config.parse_run([write(tmp_path, f"bf16: false\n{words[0][2:]}: {words[1]}\n")])


def test_defaults_fit_the_machine_and_keep_rollout_and_policy_pass_one_policy(tmp_path: Path) -> None:
    run = config.parse_run([write(tmp_path, "use_peft: true\n")])
    assert run.model.lora_dropout == 0.0 and run.training.use_cpu is not torch.accelerator.is_available()
    run = config.parse_run([write(tmp_path, "use_peft: true\nlora_dropout: 0.1\nuse_cpu: true\n")])
    assert run.model.lora_dropout == 0.1 and run.training.use_cpu
