# SPDX-License-Identifier: Apache-2.0
"""The model of a run as Unsloth's loader gives it: on the GPU, with its fast forwards and its own way to lay on LoRA.

The calls are upstream's; here is what a run of this project adds: a GGUF file is written as a folder first, the modules
that the run trains are made before the adapter, and the adapter is the one that the same flags give with TRL.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL_TARGETS
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig, ModelConfig
from trl.trainer.m3po.modules import prepare_policy

from m3po_lab.core.errors import UserError
from m3po_lab.core.saving import obey_umask
from m3po_lab.models.adapters import lora_of
from m3po_lab.models.embedded import EMBEDDED_MODEL
from m3po_lab.models.loading import is_local, load_model, settle
from m3po_lab.models.model_files import UNREADABLE, check_model_files, unreadable

HOOKED = ("llama", "qwen2", "qwen3")  # model types whose forwards in Unsloth have this project's hooks
WRITTEN = "start"  # folder in the run folder for a start model that came as GGUF


def load_with_unsloth(
    config: ModelConfig, training: GRPOConfig
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """The model of the run, with its adapter where `use_peft` is set, and its tokenizer, padding on the left.

    The tokenizer's padding token is another than its end token, which Unsloth takes care of: its passes drop padding
    wherever it stands in a row.

    Raises:
        UserError: when the model does not exist, is not readable as safetensors or GGUF, or is of a type without hooks.
        ValueError: the model and the arguments contradict each other (`prepare_policy`).
    """
    from unsloth import FastLanguageModel

    name = config.model_name_or_path or EMBEDDED_MODEL
    place = name
    if name == EMBEDDED_MODEL or name.endswith(".gguf"):
        place = str(Path(training.output_dir) / WRITTEN)
        for part in load_model(config):
            part.save_pretrained(place)
        obey_umask(Path(place))
    else:
        is_local(name)
        check_model_files(Path(name))
    try:
        model, tokenizer = FastLanguageModel.from_pretrained(
            place,
            max_seq_length=None,  # the model's own
            dtype=getattr(torch, str(config.dtype)),
            load_in_4bit=config.load_in_4bit,
            full_finetuning=not config.use_peft,
            revision=None if place != name else config.model_revision,
            use_exact_model_name=True,  # not a quantised copy of another owner
            use_gradient_checkpointing=training.gradient_checkpointing,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except UNREADABLE as error:
        raise unreadable(f"--model_name_or_path {name} cannot be loaded by Unsloth", error) from error
    check_hooked(model.config.model_type)
    settle(model, tokenizer, name)
    model.config.name_or_path = model.name_or_path = name  # an adapter's base
    if config.use_peft:
        prepare_policy(model, training, None)
        model = FastLanguageModel.get_peft_model(
            model,
            use_gradient_checkpointing=training.gradient_checkpointing,
            random_state=training.seed,
            **adapter_options(config, model.config.model_type),
        )
        model.peft_config["default"].revision = config.model_revision
    return model, tokenizer


def check_hooked(model_type: str) -> None:
    """Refuse a model that Unsloth runs by functions of another file than the one with the hooks.

    Raises:
        UserError: names the model type.
    """
    if model_type not in HOOKED:
        raise UserError(
            f"--engine unsloth: its forward of {model_type} has no hooks of this project, those of "
            f"{', '.join(HOOKED)} have; give --engine trl."
        )


def adapter_options(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """The arguments of Unsloth's `get_peft_model` for the adapter that PEFT would lay on; its own defaults are others.

    Raises:
        UserError: PEFT knows no usual target modules of the model type, and the flags name none.
    """
    adapter: Any = lora_of(config)
    targets = adapter.target_modules or USUAL_TARGETS.get(model_type)
    if targets is None:
        raise UserError(f"--lora_target_modules: name them, for there are no usual ones of {model_type}.")
    options = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "modules_to_save")
    names = targets if isinstance(targets, str) else sorted(targets)  # a text is a pattern, or all-linear
    return {"target_modules": names, **{key: getattr(adapter, key) for key in options}}
