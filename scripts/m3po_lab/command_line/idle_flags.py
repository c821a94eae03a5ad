# SPDX-License-Identifier: Apache-2.0
"""Flags that do something only with another one: LoRA's without LoRA, a mode's in another mode.

On the command line such a flag is refused where it would do nothing. A YAML file may keep the numbers of what is
switched off, as a control does that differs from its pair in one line, so long as the switch itself is set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.m3po.aslr.settings import ASLR_HYPERPARAMETERS
from transformers.m3po.gating.factory import gating_class
from transformers.m3po.settings import CROSS_PATH_MODES, RESIDUAL_MODES

from m3po_lab.core.errors import UserError

Values = Mapping[str, Any]
LORA = (
    "lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save lora_task_type "
    "use_rslora use_dora"
)
MHC = "mhc_num_streams mhc_sinkhorn_iters mhc_sinkhorn_tau mhc_residual mhc_alpha mhc_diagonal_bias mhc_gate_noise"


@dataclass(frozen=True)
class Switch:
    """Flags that depend on another one.

    Args:
        flags: their names.
        idle: says when they do nothing.
        on: on the parsed values, whether they do something.
        set_by: one of these has to be set where a YAML has the flags; empty where off is as usual as on.
    """

    flags: str
    idle: str
    on: Callable[[Values], bool]
    set_by: tuple[str, ...]


def _learns(values: Values) -> bool:
    return values["mode"] in CROSS_PATH_MODES and gating_class(values["gating_type"]).learnable


def _has_no_adapter(values: Values) -> bool:
    name = values["model_name_or_path"]
    return name is None or not (Path(name) / "adapter_config.json").is_file()


MODE = ("mode", "enable_cross_path", "thinking_residual_enabled")
SWITCHES = (
    Switch(LORA, "without --use_peft true", lambda values: values["use_peft"], ("use_peft",)),
    Switch(LORA, "on a LoRA adapter, which keeps its own", _has_no_adapter, ("use_peft",)),
    Switch(
        "bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage",
        "without --load_in_4bit true",
        lambda values: values["load_in_4bit"],
        ("load_in_4bit",),
    ),
    Switch(
        "cross_path_lambda cross_path_temp cross_path_top_k gating_type gating_config",
        "without --mode m3po or h3po",
        lambda values: values["mode"] in CROSS_PATH_MODES,
        MODE,
    ),
    Switch("cross_path_phase", "without --mode m3po, hrpo or h3po", lambda values: values["mode"] != "none", MODE),
    Switch(
        "thinking_residual_r_min thinking_residual_r_max thinking_residual_gate_learning_rate "
        "thinking_residual_lambda_learning_rate",
        "without --mode hrpo or h3po",
        lambda values: values["mode"] in RESIDUAL_MODES,
        MODE,
    ),
    Switch(
        "gating_training gating_learning_rate gating_warmup_steps",
        "without --gating_type luong or bahdanau, which learn, in --mode m3po or h3po",
        _learns,
        (*MODE, "gating_type"),
    ),
    Switch(
        "thought_top_k",
        "without --mode hrpo or h3po, or --gating_type luong or bahdanau",
        lambda values: values["mode"] in RESIDUAL_MODES or _learns(values),
        (*MODE, "gating_type"),
    ),
    Switch(
        "blend_kl_steps",
        "without --mode m3po, hrpo or h3po, or --aslr_enabled true",
        lambda values: values["mode"] != "none" or values["aslr_enabled"] is not False,
        (*MODE, "aslr_enabled"),
    ),
    # Where it is not set, the model may have ASLR; the trainer looks.
    Switch(
        " ".join(ASLR_HYPERPARAMETERS),
        "without --aslr_enabled true",
        lambda values: values["aslr_enabled"] is not False,
        ("aslr_enabled",),
    ),
    Switch(MHC, "without --mhc_enabled true", lambda values: values["mhc_enabled"], ()),
)


def given_flags(words: Iterable[str]) -> set[str]:
    """The names of the flags in command-line words; argparse takes them with dashes too."""
    return {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}


def idle_flags(groups: Iterable[Any], names: Iterable[str]) -> dict[str, Switch]:
    """Those of the flags `names` that do nothing, each with the switch that is off.

    Args:
        groups: the parsed arguments, as dataclasses.
    """
    values = {entry.name: getattr(group, entry.name) for group in groups for entry in dataclasses.fields(group)}
    off = [switch for switch in SWITCHES if set(switch.flags.split()) <= set(values) and not switch.on(values)]
    return {name: switch for name in sorted(names) for switch in off if name in switch.flags.split()}


def check_idle(groups: Sequence[Any], words: Iterable[str], in_yaml: Iterable[str]) -> None:
    """Refuse a flag that does nothing: on the command line, or in the YAML where its switch is not set.

    Args:
        groups: the parsed arguments.
        words: of the command line.
        in_yaml: the keys of the YAML file.

    Raises:
        UserError: names the flag and says when it does nothing.
    """
    on_command_line, keys = given_flags(words), set(in_yaml)
    for name, switch in idle_flags(groups, on_command_line | keys).items():
        if name in on_command_line or (switch.set_by and not (on_command_line | keys) & set(switch.set_by)):
            raise UserError(f"--{name} does nothing {switch.idle}: change that, or leave --{name} out.")


def without(words: Sequence[str], names: Iterable[str]) -> list[str]:
    """Command-line words without the flags `names` and their values."""
    remaining: list[str] = []
    dropping = False
    for word in words:
        if word.startswith("--"):
            dropping = bool(given_flags([word]) & set(names))
        if not dropping:
            remaining.append(word)
    return remaining
