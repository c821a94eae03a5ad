# SPDX-License-Identifier: Apache-2.0
"""Values that libraries refuse late or never are refused when a command is parsed, in GRPO and in pretraining alike."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from trl import GRPOConfig, ModelConfig

from m3po_lab.command_line.flag_rules import CHOICES, RULE_OF
from m3po_lab.command_line.training_checks import MAPPINGS
from m3po_lab.controller.arguments import ControllerArguments
from m3po_lab.core.errors import PROJECT_ROOT, UserError
from m3po_lab.grpo.arguments import RunArguments
from m3po_lab.grpo.config import parse_run
from m3po_lab.pretraining import arguments
from m3po_lab.sweep import main as sweep


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text("use_cpu: true\nbf16: false\n")
    return file


PARSERS: dict[str, Callable[[list[str]], object]] = {
    "grpo": parse_run,
    "pretraining": lambda words: arguments.parse([str(PROJECT_ROOT / "configs" / "mhc_small.yaml"), *words[1:]]),
}


@pytest.mark.parametrize("command", PARSERS)
@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ("--per_device_train_batch_size 0", "a whole number of at least 1"),
        ("--per_device_eval_batch_size -1", "a whole number of at least 1"),
        ("--gradient_accumulation_steps 0", "a whole number of at least 1"),
        ("--max_steps 0", "a whole number of at least 1, or -1"),
        ("--seed -1", "a whole number from 0 to 4294967295"),
        ("--save_steps 0", "a whole number of steps of at least 1, or a share"),
        ("--save_steps inf", "a whole number of steps"),
        ("--logging_steps -1", "a whole number of steps"),
        ("--logging_steps nan", "a whole number of steps"),
        ("--eval_steps 0", "a whole number of steps"),
        ("--learning_rate -1", "at least 0"),
        ("--learning_rate nan", "at least 0"),
        ("--learning_rate inf", "at least 0"),
        ("--warmup_steps nan", "at least 0"),
        ("--weight_decay -0.1", "at least 0"),
        ("--adam_beta1 1", "at least 0 and below 1"),
        ("--adam_epsilon nan", "at least 0"),
        ("--max_grad_norm nan", "at least 0"),
        ("--num_train_epochs 0", "above 0"),
        ("--label_smoothing_factor 1", "at least 0 and below 1"),
        ("--neftune_noise_alpha -1", "at least 0"),
        ("--dataloader_num_workers -1", "a whole number of at least 0"),
        ("--eval_delay nan", "at least 0"),
        ("--save_total_limit -1", "a whole number of at least 0"),
    ],
)
def test_a_number_out_of_its_range_is_refused_by_name(command: str, words: str, rule: str, yaml: Path) -> None:
    with pytest.raises(UserError) as found:
        PARSERS[command]([str(yaml), *words.split()])
    assert str(found.value).startswith(f"{words.split()[0]} ") and f": it must be {rule}" in str(found.value)


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ("--num_generations 0", "a whole number of at least 2"),
        ("--num_generations 1", "a whole number of at least 2"),
        ("--max_completion_length 0", "a whole number of at least 1"),
        ("--num_iterations 0", "a whole number of at least 1"),
        ("--steps_per_generation 0", "a whole number of at least 1"),
        ("--generation_batch_size -8", "a whole number of at least 1"),
        ("--temperature 0", "above 0"),
        ("--temperature nan", "above 0"),
        ("--top_p 0", "above 0 and at most 1"),
        ("--top_p 1.5", "above 0 and at most 1"),
        ("--min_p -0.1", "at least 0 and at most 1"),
        ("--top_k -1", "a whole number of at least 0"),
        ("--repetition_penalty 0", "above 0"),
        ("--beta -1", "at least 0"),
        ("--epsilon nan", "at least 0"),
        ("--delta 0", "above 0"),
        ("--num_train_problems 0", "a whole number of at least 1"),
        ("--num_eval_problems -1", "a whole number of at least 1"),
        ("--use_peft true --lora_r 0", "a whole number of at least 1"),
        ("--use_peft true --lora_dropout 1", "at least 0 and below 1"),
        ("--vllm_server_timeout nan", "a finite number"),
        ("--loss_type x", "one of dapo, grpo"),
        ("--scale_rewards x", "one of group, batch, none"),
        ("--importance_sampling_level x", "one of token, sequence"),
        ("--multi_objective_aggregation x", "one of sum_then_normalize"),
    ],
)
def test_a_value_of_grpo_that_cannot_be_is_refused_by_name(words: str, rule: str, yaml: Path) -> None:
    with pytest.raises(UserError, match=rf"^{words.split()[-2]} .*: it must be {rule}"):
        parse_run([str(yaml), *words.split()])


@pytest.mark.parametrize("words", ["--depth 0", "--max_seq_len 1", "--validation_rows 0", "--num_heads 0"])
def test_a_size_of_a_pretrained_model_that_cannot_be_is_refused(words: str) -> None:
    with pytest.raises(UserError, match=r"it must be a whole number of at least [12]"):
        PARSERS["pretraining"](["", *words.split()])
    with pytest.raises(UserError, match="--model_dim 130: it must be a multiple of 2 . num_heads = 4"):
        PARSERS["pretraining"](["", "--model_dim", "130"])


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (
            "prompt_template: {question}",
            "--prompt_template {'question': None}: it must be a text: in a YAML file, put it",
        ),
        ("prompt_template: 5", "--prompt_template 5: it must be a text"),
        ("dataset: [a]", "--dataset ['a']: it must be a text"),
        ("model_revision: 1234", "--model_revision 1234: it must be a text"),
        ("max_steps: 2.5", "--max_steps 2.5: it must be a whole number"),
        ("max_steps: true", "--max_steps True: it must be a whole number"),
        ("per_device_train_batch_size: [8]", "--per_device_train_batch_size [8]: it must be a whole number"),
        ("num_generations: null", "--num_generations None: it must be a whole number"),
        ("learning_rate: .nan", "--learning_rate nan: it must be at least 0"),
    ],
)
def test_a_value_of_another_type_in_a_yaml_is_refused_by_name(line: str, why: str, yaml: Path) -> None:
    yaml.write_text(f"{yaml.read_text()}{line}\n")
    with pytest.raises(UserError) as found:
        parse_run([str(yaml)])
    assert str(found.value).startswith(why)


def test_values_at_the_ends_of_their_ranges_are_taken(yaml: Path) -> None:
    yaml.write_text(f"{yaml.read_text()}scale_rewards: false\nsystem_prompt: null\nresume_from_checkpoint: true\n")
    words = "--learning_rate 0 --warmup_steps 0.1 --max_steps -1 --logging_steps 0.5 --top_p 1 --min_p 0 --beta 0"
    words += " --max_grad_norm inf --save_total_limit 0 --adam_beta1 0 --eval_delay 0"
    run = parse_run([str(yaml), *words.split()])
    assert (run.training.max_steps, run.training.scale_rewards) == (-1, "none")


def test_every_rule_is_of_a_flag_and_every_number_has_one() -> None:
    groups = (GRPOConfig, ModelConfig, RunArguments, arguments.PretrainArguments, ControllerArguments)
    kinds = {entry.name: str(entry.type) for group in groups for entry in dataclasses.fields(group)}
    assert {*RULE_OF, *CHOICES, *MAPPINGS} <= set(kinds)
    numbers = {name for name, kind in kinds.items() if "int" in kind or "float" in kind}
    checked_elsewhere = (
        "blend_kl_steps",
        "vllm_",
        "aslr_",
        "mhc_",
        "cross_path_",
        "gating_",
        "thinking_residual_",
        "vespo_",
    )
    without = {name for name in numbers - set(RULE_OF) if not name.startswith(checked_elsewhere)}
    of_the_controller = {"control_grid", "action_grid", "seeds", "log_std_init"}  # but for the last checked there
    seeds = {"data_seed", "eval_seed", "problem_seed"}
    assert without == {*seeds, "local_rank", "reward_weights", "thought_top_k", *of_the_controller}


@pytest.mark.parametrize("command", PARSERS)
@pytest.mark.parametrize(
    "name", sorted({*INTEGRATION_TO_CALLBACK, "nope"} - set(get_available_reporting_integrations()))
)
def test_a_reporter_that_cannot_be_had_is_refused_by_name(command: str, name: str, yaml: Path) -> None:
    why = "is unknown" if name == "nope" else "needs a package that is not installed"
    with pytest.raises(UserError, match=rf"^--report_to {name} {why}; give one of .*none\.$"):
        PARSERS[command]([str(yaml), "--report_to", name])


@pytest.mark.parametrize("name", ["all", "none", "tensorboard"])
def test_a_reporter_that_is_there_is_taken(name: str, yaml: Path) -> None:
    parse_run([str(yaml), "--report_to", name])


@pytest.mark.parametrize("command", PARSERS)
@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--optim", "nope"], "argument --optim: invalid choice: 'nope'"),
        (["--optim", "lomo"], "--optim lomo cannot be used here: You need to install `lomo_optim`"),
        (["--optim", "grokadamw"], "--optim grokadamw cannot be used here: Please install grokadamw"),
        (["--optim", "stable_adamw"], "--optim stable_adamw cannot be used here: You need to install `torch-optimi`"),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "--lr_scheduler_type cosine_with_min_lr with"),
        (["--lr_scheduler_kwargs", '{"a": 1}'], "--lr_scheduler_type (linear|cosine) with --lr_scheduler_kwargs"),
        (["--lr_scheduler_kwargs", "x"], "--lr_scheduler_kwargs 'x': it must be a JSON object"),
        (["--gradient_checkpointing_kwargs", "x"], "--gradient_checkpointing_kwargs 'x': it must be a JSON object"),
        (["--use_liger_kernel", "true"], "--use_liger_kernel true needs the package liger-kernel"),
        (["--bf16", "true", "--fp16", "true"], "At most one of fp16 and bf16"),
        (["--deepspeed", "nowhere.json"], "needs a package that is not installed .*deepspeed.*: leave the flag out"),
        (["--accelerator_config", "nowhere.json"], "nowhere.json"),
    ],
)
def test_what_the_trainer_would_find_out_late_is_refused_at_once(
    command: str, words: list[str], why: str, yaml: Path
) -> None:
    with pytest.raises(UserError, match=why) as found:
        PARSERS[command]([str(yaml), *words])
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--chat_template_kwargs", "x"], "--chat_template_kwargs 'x': it must be a JSON object"),
        (["--generation_kwargs", "x"], "--generation_kwargs 'x': it must be a JSON object"),
        (["--cache_implementation", "offloaded"], "--cache_implementation offloaded needs a GPU"),
        (["--remove_unused_columns", "true"], "--remove_unused_columns true drops the answers"),
        (
            ["--attn_implementation", "flash_attention_2"],
            "flash_attention_2 needs the package flash_attn, which is not",
        ),
        (["--attn_implementation", "flex_attention"], "flex_attention has no gradients on a CPU"),
        (["--overwrite", "configs/demo.yaml"], "argument --overwrite: .*Give the YAML file first."),
    ],
)
def test_what_a_rollout_would_find_out_late_is_refused_at_once(words: list[str], why: str, yaml: Path) -> None:
    with pytest.raises(UserError, match=why):
        parse_run([str(yaml), *words])


def test_a_sweep_finds_it_before_its_first_run(yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(yaml), "--output_dir", str(tmp_path / "out")]
    assert sweep([*words, "--report_to", "wandb"]) == 2 and sweep([*words, "--max_steps", "0"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["--report_to", "--max_steps"]
