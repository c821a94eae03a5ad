# SPDX-License-Identifier: Apache-2.0
"""The arguments of a run: our few flags next to TRL's `GRPOConfig` and `ModelConfig`, from YAML and command line.

TRL's `TrlParser` reads both; here is only what it lacks: a positional YAML, one clear line instead of a usage page or a
traceback, no abbreviated flags (a mistyped flag must not become another one), and the name of the run folder.
"""

import dataclasses
import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import GRPOConfig, ModelConfig, TrlParser

from m3po_lab.command_line.flag_rules import check_values
from m3po_lab.command_line.training_checks import check_training
from m3po_lab.core.config_files import DEFAULT_CONFIG, YAML_ENDINGS, find_config, split_config
from m3po_lab.core.errors import PROJECT_ROOT, UserError, one_line, short
from m3po_lab.core.processes import on_cpus
from m3po_lab.grpo.engine import TRL, Engine, check_flags
from m3po_lab.grpo.idle_flags import check_idle

UNSET_OUTPUT_DIR = "trainer_output"  # what TrainingArguments fills in when no output_dir is given
DTYPES = ("auto", "bfloat16", "float16", "float32")
FLASH = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}  # and its package
DEFAULT_REWARD_WEIGHTS = [1.0, 0.25]  # correct, format; dyadic, so that a uniform group has a standard deviation of 0


@dataclass
class RunArguments:
    """What a run needs beyond TRL's `GRPOConfig` and `ModelConfig`: the problems, the prompt and the held-out set."""

    dataset: str = field(
        default="reasoning-gym:chain_sum",
        metadata={
            "help": "Problems: 'reasoning-gym:<task>' (generated); from the Hub 'openai/gsm8k', "
            "'EleutherAI/hendrycks_math' (MATH) or 'mmlu_arc' (MMLU's auxiliary_train and ARC-Challenge); or the path "
            "of a .jsonl file with GSM8K's fields 'question' and 'answer', the latter ending in '#### <number>'."
        },
    )
    dataset_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Options of the reasoning-gym task as JSON or YAML, e.g. '{\"max_digits\": 2}'."},
    )
    num_train_problems: int = field(
        default=4000,
        metadata={"help": "Training problems. A generated task may repeat one, as its distribution does."},
    )
    num_eval_problems: int = field(
        default=400,
        metadata={"help": "Held-out problems for the report: distinct, and excluded from training."},
    )
    problem_seed: int = field(
        default=7, metadata={"help": "Seed of the training problems and of their order in the run."}
    )
    eval_seed: int = field(default=999, metadata={"help": "Seed of the held-out problems."})
    system_prompt: str | None = field(
        default=None, metadata={"help": "System turn before every prompt; none if unset."}
    )
    prompt_template: str = field(
        default="{question}",
        metadata={
            "help": "The user turn. '{question}' and, for a generated task, the text and number fields of its "
            "metadata are filled in, e.g. 'What is {expression}?' for chain_sum. Other braces are doubled: {{ and }}."
        },
    )
    worked_example: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "A solved problem shown before each one as a user and an assistant turn, as JSON or YAML: "
            "{question: What is 7 + 5?, answer: It is 12.}"
        },
    )
    engine: str = field(
        default="auto",
        metadata={
            "help": "What trains: 'trl', 'unsloth' (needs an NVIDIA GPU and the extra unsloth of the environment), or "
            "'auto', which takes Unsloth for LoRA where it can run and else TRL. docs/engines.md has what each can do."
        },
    )
    overwrite: bool = field(
        default=False,
        metadata={"help": "Start anew in a run folder that has checkpoints; they and the old report are deleted."},
    )

    def __post_init__(self) -> None:
        self.dataset_config = parse_mapping("dataset_config", self.dataset_config)
        self.worked_example = parse_mapping("worked_example", self.worked_example)
        if self.worked_example is not None and set(self.worked_example) != {"question", "answer"}:
            raise UserError(
                f"--worked_example has the keys {sorted(self.worked_example)}: it needs just 'question' and 'answer'."
            )


@dataclass
class Run:
    """One parsed command: the three argument groups, where the YAML came from, and what will train."""

    script: RunArguments
    training: GRPOConfig
    model: ModelConfig
    config_file: Path
    engine: Engine

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.training.output_dir)

    @property
    def groups(self) -> tuple[RunArguments, GRPOConfig, ModelConfig]:
        """All arguments."""
        return self.script, self.training, self.model


class OneLineParser(TrlParser):
    """`TrlParser` whose errors are one line (`UserError`), which takes no abbreviated flags and checks their values."""

    def __init__(self, *groups: Any) -> None:
        super().__init__(list(groups), allow_abbrev=False)
        self.set_defaults(use_cpu=on_cpus())  # bf16 without a GPU needs it

    def error(self, message: str) -> NoReturn:
        hint = " Give the YAML file first." if any(ending in message for ending in YAML_ENDINGS) else ""
        raise UserError(f"{message} (all flags: --help).{hint}")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """That of argparse; the values are checked before `TrlParser` makes dataclasses of them."""
        found = super().parse_known_args(args, namespace)
        check_values(vars(found[0]), self.dataclass_types)
        return found

    def flags(self) -> list[str]:
        """Every long flag, e.g. for a suggestion."""
        return [f"--{entry.name}" for group in self.dataclass_types for entry in dataclasses.fields(group)]


class RunParser(OneLineParser):
    """That of a run of GRPO."""

    def __init__(self, training: type[GRPOConfig] = GRPOConfig) -> None:
        super().__init__(RunArguments, training, ModelConfig)
        self.set_defaults(lora_dropout=0.0)  # TRL's default makes rollout and policy pass two policies


def parse_mapping(name: str, value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """A mapping given as such (YAML file) or as JSON or YAML text (command line).

    Raises:
        UserError: when the text cannot be read or is not a mapping.
    """
    if isinstance(value, str):
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--{name} is not JSON or YAML: {one_line(error)}") from error
    if value is not None and not isinstance(value, dict):
        raise UserError(f"--{name} = {value!r}: it must be a mapping, e.g. '{{\"key\": 1}}'.")
    return value


@contextmanager
def one_line_errors(config_file: Path) -> Iterator[None]:
    """What argument groups and the reading of a YAML raise, as a `UserError`."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"{config_file.name} or a flag needs a package that is not installed ({short(error)}): leave the flag out, "
            "or install it with .venv/bin/pip."
        ) from error
    except (ValueError, TypeError, OSError, yaml.YAMLError) as error:
        raise UserError(f"{config_file.name} or a flag: {one_line(error)}") from error


def check_unknown(parser: OneLineParser, from_yaml: list[str], from_command_line: list[str], config_file: Path) -> None:
    """Refuse what no argument group knows, naming the nearest flag.

    Raises:
        UserError: for the first unknown word.
    """
    for word in from_yaml[::2] + from_command_line:
        flag = word.split("=")[0]
        where = f"{config_file}: unknown key '{flag[2:]}'" if word in from_yaml[::2] else f"Unknown argument {flag}"
        near = difflib.get_close_matches(flag, parser.flags(), n=1)
        raise UserError(f"{where}.{f' Did you mean {near[0]}?' if near else ''} All flags: --help.")


def parse_run(argv: list[str], engine: Engine = TRL, idle: bool = False) -> Run:
    """Read ``[X.yaml] [--flag value ...]``; without a YAML, `configs/demo.yaml`.

    The command line wins over the YAML. An output_dir that neither gives becomes
    ``runs/<config>-<mode>[-<gate>][-aslr]-seed<seed>`` in the project's root; the gate if it is not the baseline.
    `engine` is the one that was chosen (`engine.choose_engine`) and, if it is Unsloth, imported. With `idle`, flags
    that do nothing in this run are let pass (`idle_flags`).

    Raises:
        UserError: for anything that cannot be read, is unknown or fails the validation of an argument group.
    """
    given, rest = split_config(argv)
    config_file = find_config(given or DEFAULT_CONFIG)
    words = ["--config", str(config_file), *rest]
    parser = RunParser()
    with one_line_errors(config_file):
        script, training, model, yaml_unknown, unknown = parser.parse_args_and_config(
            words, return_remaining_strings=True, separate_remaining_strings=True
        )
        if engine.name == "unsloth":
            as_trl = RunParser(trls_config()).parse_args_and_config(words, return_remaining_strings=True)
            keep_values(training, as_trl[1])
    check_unknown(parser, yaml_unknown, unknown, config_file)
    if training.reward_weights is None:
        training.reward_weights = list(DEFAULT_REWARD_WEIGHTS)
    if len(training.reward_weights) != 2:
        raise UserError(
            f"--reward_weights = {training.reward_weights}: give two, for the correct and the format reward."
        )
    if training.trust_remote_code:
        raise UserError("--trust_remote_code true is refused: code that comes with a model is never run here.")
    if training.remove_unused_columns:
        raise UserError("--remove_unused_columns true drops the answers that the rewards need; leave it out.")
    check_model_flags(model, training.device.type)
    if training.output_dir == UNSET_OUTPUT_DIR:
        gate = f"-{training.gating_type}" if training.enable_cross_path and training.gating_type != "baseline" else ""
        aslr = "-aslr" if training.aslr_enabled else ""
        name = f"{config_file.stem}-{training.mode}{gate}{aslr}-seed{training.seed}"
        training.output_dir = str(PROJECT_ROOT / "runs" / name)
    run = Run(script, training, model, config_file, engine)
    check_flags(run)
    if not idle:
        check_idle(run.groups, rest, read_keys(config_file))
    check_training(training)
    return run


def read_keys(config_file: Path) -> list[str]:
    """The keys of a YAML file that has been parsed before."""
    return list(yaml.safe_load(config_file.read_text(encoding="utf-8")))


def trls_config() -> type[GRPOConfig]:
    """TRL's own `GRPOConfig`, in whose place Unsloth puts one that it derives from it and that has its name."""
    return [kind for kind in GRPOConfig.__mro__ if kind.__module__ == "trl.trainer.grpo_config"][-1]


def keep_values(training: GRPOConfig, as_trl: GRPOConfig) -> None:
    """Puts back, in place and with a line each, the values that Unsloth's arguments class has overridden.

    It replaces some by those of the papers it knows (`epsilon_high` of DAPO and CISPO, `scale_rewards` of Dr. GRPO) and
    rounds batch sizes: the same command would be another run than with TRL.
    """
    for entry in dataclasses.fields(as_trl):
        wanted, found = getattr(as_trl, entry.name), getattr(training, entry.name)
        if wanted != found:
            setattr(training, entry.name, wanted)
            print(f"--{entry.name} stays {wanted!r}: the {found!r} that Unsloth would set is not what the flags say")


def check_model_flags(model: ModelConfig, device: str) -> None:
    """Refuse what `models.load_model` would not do, or what cannot be trained on a kind of device.

    Raises:
        UserError: for weights in 8 bits, a dtype that is none, and an attention that is not here or has no gradients.
    """
    if model.load_in_8bit:
        raise UserError("--load_in_8bit true is refused: such base weights are not supported here; leave it out.")
    if model.dtype is not None and model.dtype not in DTYPES:
        raise UserError(f"--dtype {model.dtype} is unknown; give one of {', '.join(DTYPES)}.")
    package = FLASH.get(model.attn_implementation or "")
    if package is not None and find_spec(package) is None:
        raise UserError(
            f"--attn_implementation {model.attn_implementation} needs the package {package}, which is not installed; "
            "leave it out."
        )
    if model.attn_implementation == "flex_attention" and device == "cpu":
        raise UserError("--attn_implementation flex_attention has no gradients on a CPU; leave it out.")


def changed_values(run: Run) -> dict[str, Any]:
    """Every argument that differs from its default, for `summary.json`; the run folder is where that lies."""
    changed = {}
    for group in run.groups:
        for spec in dataclasses.fields(group):
            value = getattr(group, spec.name)
            made = spec.default_factory() if spec.default_factory is not dataclasses.MISSING else spec.default
            told = spec.init and value != made and spec.name != "output_dir"
            if told and isinstance(value, bool | int | float | str | list | dict):
                changed[spec.name] = value
    return changed
