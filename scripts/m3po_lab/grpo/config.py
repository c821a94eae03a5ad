# SPDX-License-Identifier: Apache-2.0
"""Reading the command of a run of GRPO, and checking what its flags say together."""

import dataclasses
from importlib.util import find_spec

from trl import GRPOConfig, ModelConfig

from m3po_lab.command_line.idle_flags import check_idle
from m3po_lab.command_line.parser import UNSET_OUTPUT_DIR, OneLineParser, check_unknown, one_line_errors, read_keys
from m3po_lab.command_line.training_checks import check_training
from m3po_lab.core.config_files import DEFAULT_CONFIG, find_config, split_config
from m3po_lab.core.errors import PROJECT_ROOT, UserError
from m3po_lab.grpo.arguments import Run, RunArguments
from m3po_lab.grpo.engine import TRL, Engine, check_flags

DTYPES = ("auto", "bfloat16", "float16", "float32")
FLASH = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}  # and its package
DEFAULT_REWARD_WEIGHTS = [1.0, 0.25]  # correct, format; dyadic, so that a uniform group has a standard deviation of 0


class RunParser(OneLineParser):
    """The parser of a run of GRPO."""

    def __init__(self, training: type[GRPOConfig] = GRPOConfig) -> None:
        super().__init__(RunArguments, training, ModelConfig)
        # TRL's dropout makes rollout and policy pass two policies; GRPOConfig's own sharing and measuring are off, as
        # upstream's are.
        self.set_defaults(lora_dropout=0.0, shared_prefix="auto", blend_kl_steps=None)


def parse_run(argv: list[str], engine: Engine = TRL, idle: bool = False) -> Run:
    """Read ``[X.yaml] [--flag value ...]``; without a YAML, `configs/demo.yaml`.

    The command line wins over the YAML. An output_dir that neither gives becomes
    ``runs/<config>-<mode>[-<gating function>][-aslr]-seed<seed>`` in the project's root, without the baseline's name.
    `engine` is the one that was chosen (`engine.choose_engine`) and, if it is Unsloth, imported. With `idle`, flags
    that do nothing in this run are let pass (`idle_flags`).

    Raises:
        UserError: for anything that cannot be read, is unknown or fails the validation of an argument group.
    """
    config_name, rest = split_config(argv)
    config_file = find_config(config_name or DEFAULT_CONFIG)
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
    check_flags(engine, run.groups)
    if not idle:
        check_idle(run.groups, rest, read_keys(config_file))
    check_training(training)
    return run


def trls_config() -> type[GRPOConfig]:
    """TRL's own `GRPOConfig`, in whose place Unsloth puts one that it derives from it and that has its name."""
    return [kind for kind in GRPOConfig.__mro__ if kind.__module__ == "trl.trainer.grpo_config"][-1]


def keep_values(training: GRPOConfig, as_trl: GRPOConfig) -> None:
    """Puts back, in place and with a line each, the values that Unsloth's arguments class has overridden.

    It replaces some by those of the papers it knows (`epsilon_high` of DAPO and CISPO, `scale_rewards` of Dr. GRPO) and
    rounds batch sizes: the same command would be another run than with TRL.
    """
    for entry in dataclasses.fields(as_trl):
        as_asked, as_set = getattr(as_trl, entry.name), getattr(training, entry.name)
        if as_asked != as_set:
            setattr(training, entry.name, as_asked)
            print(f"--{entry.name} stays {as_asked!r}: the {as_set!r} that Unsloth would set is not what the flags say")


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
