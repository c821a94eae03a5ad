# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters: the one that the flags of a run ask for, and one in a folder with the modules that it brings."""

from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.m3po.checkpoint import CHECKPOINT_FILE
from transformers.m3po.modules import ADDED_MODULES, AddedModules
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
        targets = getattr(config, flag) or ()
        for name in [targets] if isinstance(targets, str) else targets:
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
        ValueError: the files of the adapter contradict each other, or do not say what one of its modules is.
    """
    hyperparameters = read_json(folder / CHECKPOINT_FILE) or {}
    for modules in _brought_modules(folder, hyperparameters):
        missing = [name for name in modules.needs if name not in hyperparameters]
        if missing:
            raise ValueError(
                f"its adapter brings {modules.article}, and its {CHECKPOINT_FILE} does not say {missing[0]}; take the "
                "folder as its run saved it"
            )
        modules.attach(base, hyperparameters)
    return PeftModel.from_pretrained(base, str(folder), is_trainable=True)


def _brought_modules(folder: Path, hyperparameters: dict[str, Any]) -> list[AddedModules]:
    """The modules that an adapter trains whole.

    Args:
        folder: of the adapter.
        hyperparameters: what its `m3po.json` says.

    Raises:
        ValueError: it says so and does not bring all of one, which PEFT would leave as it is, or it brings one that it
            does not name, which PEFT would drop.
    """
    saved = set(PeftConfig.from_pretrained(str(folder)).modules_to_save or ())
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as weights:
        keys = list(weights.keys())
    brought = []
    for modules in ADDED_MODULES:
        present = modules.among(keys)
        if saved & set(modules.names):
            parameters = modules.parameters(hyperparameters)
            missing = [name for name in parameters if not any(key.endswith(name) for key in present)]
            if missing:
                raise ValueError(
                    f"its adapter_config.json names {modules.article}, and its weights lack {missing[0]}; take the "
                    "folder as its run saved it"
                )
            brought.append(modules)
        elif present:
            raise ValueError(
                f"its weights have {present[0]}, and its adapter_config.json does not name {modules.article}; take the "
                "folder as its run saved it"
            )
    return brought
