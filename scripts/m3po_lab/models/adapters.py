# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters: the one that the flags of a run ask for, and one in a folder with the modules that it brings."""

from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.m3po.aslr.modules import attach_aslr
from transformers.m3po.aslr.settings import ASLR_NUMBERS
from transformers.m3po.checkpoint import CHECKPOINT_FILE
from transformers.m3po.gating.module import attach_gating
from transformers.m3po.modules import ASLR, GATING, OWN_MODULES, RESIDUAL_GATE, OwnModules
from transformers.m3po.thinking.residual_gate import attach_residual_gate
from trl import ModelConfig, get_peft_config

from m3po_lab.core.errors import UserError
from m3po_lab.core.files import read_json


def lora_of(config: ModelConfig) -> PeftConfig | None:
    """The adapter that the flags ask for, None without; it says which weights it belongs to.

    It is TRL's `get_peft_config`, but for a single name in `--lora_target_modules`: TRL hands PEFT a pattern for whole
    paths then, which a name never matches.

    Raises:
        UserError: LoRA is asked for on the head, which TRL's scoring passes leave out.
    """
    for flag in ("lora_target_modules", "lora_target_parameters"):
        given = getattr(config, flag) or ()
        for name in [given] if isinstance(given, str) else given:
            if "lm_head" in name.split("."):
                raise UserError(
                    f"--{flag} {name}: log-probs are computed from the head's own matrix, so LoRA on it would never "
                    "learn; leave it out, or train the head whole with --lora_modules_to_save lm_head."
                )
    adapter = get_peft_config(config)
    if adapter is not None:
        adapter.revision = config.model_revision
        if isinstance(adapter.target_modules, str) and adapter.target_modules.isidentifier():
            adapter.target_modules = {adapter.target_modules}
    return adapter


def base_config(folder: Path, config: ModelConfig) -> ModelConfig:
    """How the base model is loaded that an adapter names; the other arguments are those of the adapter's config."""
    adapter = PeftConfig.from_pretrained(str(folder))
    return ModelConfig(
        model_name_or_path=adapter.base_model_name_or_path,
        model_revision=adapter.revision or "main",
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
    )


def load_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """An adapter on the base model that it names, trainable; the base model gets the modules that the adapter brings.

    Raises:
        ValueError: the files of the adapter contradict each other.
    """
    numbers = read_json(folder / CHECKPOINT_FILE) or {}
    for own in _brought_modules(folder, numbers):
        _attach(own, base, numbers)
    return PeftModel.from_pretrained(base, str(folder), is_trainable=True)


def _attach(own: OwnModules, base: PreTrainedModel, numbers: dict[str, Any]) -> None:
    """Give the base model the modules that an adapter will fill, with the numbers of its `m3po.json`.

    Raises:
        ValueError: the file does not say the numbers of ASLR or the gate, or they are none.
    """
    if own is RESIDUAL_GATE:  # the bounds only say what the gate began with
        start = {"r_min": 0.99, "r_max": 0.999}
        told = {name: numbers.get(f"thinking_residual_{name}", value) for name, value in start.items()}
        attach_residual_gate(base, **told, seed=0)
        return
    needed = ("gating_type", "gating_config") if own is GATING else (ASLR.switch, *ASLR_NUMBERS)
    missing = [name for name in needed if name not in numbers]
    if missing:
        raise ValueError(
            f"its adapter brings {own.article}, and its {CHECKPOINT_FILE} does not say {missing[0]}; take the folder "
            "as its run saved it"
        )
    if own is GATING:
        attach_gating(base, numbers["gating_type"], numbers["gating_config"])
        return
    attach_aslr(base, **{name: numbers[name] for name in ASLR_NUMBERS})


def _brought_modules(folder: Path, numbers: dict[str, Any]) -> list[OwnModules]:
    """The modules that an adapter trains whole; `numbers` are those of its `m3po.json`.

    Raises:
        ValueError: it says so and does not bring all of one, which PEFT would leave as it is, or it brings one that it
            does not name, which PEFT would drop.
    """
    saved = set(PeftConfig.from_pretrained(str(folder)).modules_to_save or ())
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as weights:
        keys = list(weights.keys())
    brought = []
    for own in OWN_MODULES:
        named, found = saved & set(own.names), own.among(keys)
        if named:
            missing = [name for name in own.parameters(numbers) if not any(key.endswith(name) for key in found)]
            if missing:
                raise ValueError(
                    f"its adapter_config.json names {own.article}, and its weights lack {missing[0]}; take the folder "
                    "as its run saved it"
                )
            brought.append(own)
        elif found:
            raise ValueError(
                f"its weights have {found[0]}, and its adapter_config.json does not name {own.article}; take the "
                "folder as its run saved it"
            )
    return brought
