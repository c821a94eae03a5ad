# SPDX-License-Identifier: Apache-2.0
"""The model and the tokenizer of a run: the embedded SmolLM2-135M-Instruct, any local folder, GGUF file or Hub id.

Weights come as safetensors or GGUF only, and code that comes with a model is never run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig

from m3po_lab.core.errors import UserError
from m3po_lab.models.adapters import base_config, load_adapter
from m3po_lab.models.embedded import EMBEDDED_MODEL, embedded_gguf, repair_embedded
from m3po_lab.models.model_files import UNREADABLE, check_model_files, unreadable


def load_model(config: ModelConfig) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """The model in the dtype of the config, on the CPU, and its tokenizer, padding on the left.

    A folder that holds a LoRA adapter gives a trainable `PeftModel` on the base model it names.

    Raises:
        UserError: when the model does not exist or is not readable as safetensors or GGUF.
    """
    name = config.model_name_or_path or EMBEDDED_MODEL
    check_model_files(Path(name))
    if name != EMBEDDED_MODEL and (Path(name) / "adapter_config.json").is_file():
        return _load_with_adapter(Path(name), config)
    if name == EMBEDDED_MODEL:
        model, tokenizer = _load_gguf(embedded_gguf(), config)
        repair_embedded(model, tokenizer)
    elif name.endswith(".gguf"):
        if not Path(name).is_file():
            raise UserError(f"--model_name_or_path {name} does not exist.")
        model, tokenizer = _load_gguf(Path(name), config)
    else:
        model, tokenizer = _load_pretrained(name, config)
    settle(model, tokenizer, name)
    return model, tokenizer


def load_base_model(folder: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model without chat template in the dtype of its files, on the GPU if there is one, and its tokenizer.

    Raises:
        UserError: the folder has no model, or one that cannot be read.
    """
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder} is not a model folder: give the folder final of a run.")
    check_model_files(Path(folder))
    with without_flag():
        model, tokenizer = _load_pretrained(folder, ModelConfig(dtype="auto"))
    return model.eval().to(device()), tokenizer


@contextmanager
def without_flag() -> Iterator[None]:
    """Errors do not name the flag `--model_name_or_path`, where the model is the first word of a command."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).removeprefix("--model_name_or_path ")) from error


def device() -> str:
    """The GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def settle(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Make a loaded model and its tokenizer what rollouts need (in place).

    Raises:
        UserError: the tokenizer has no chat template.
    """
    forget_sampling_defaults(model)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        raise UserError(f"--model_name_or_path {name}: its tokenizer has no chat template; take an instruct model.")


def forget_sampling_defaults(model: PreTrainedModel) -> None:
    """Leave only the special tokens in the model's generation config (in place).

    Many instruct models bring a repetition penalty, top-k or top-p. `generate` fills in what a call leaves open from
    there, so rollouts would be sampled from another distribution than the policy pass scores, and "greedy" evaluation
    would not be greedy.
    """
    own = model.generation_config
    tokens = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**tokens)


def _dtype(config: ModelConfig) -> torch.dtype | str:
    return config.dtype if config.dtype in (None, "auto") else getattr(torch, config.dtype)


def _load_gguf(file: Path, config: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Dequantise a GGUF file; Transformers finds it by its folder and name."""
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            **where,
            quantization_config=GgufConfig(dequantize=True),
            dtype=_dtype(config),
            attn_implementation=config.attn_implementation,
        )
        return model, AutoTokenizer.from_pretrained(**where)
    except UNREADABLE as error:
        raise unreadable(
            f"--model_name_or_path {file} cannot be read as GGUF, copy or download it again", error
        ) from error


def is_local(name: str) -> bool:
    """Whether a model's name is that of a local folder, and not a Hub id.

    Raises:
        UserError: it is one and holds no model.
    """
    local = Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
    if local and not (Path(name) / "config.json").is_file():
        raise UserError(f"--model_name_or_path {name} is not a model folder: no config.json there.")
    return local


def _load_pretrained(name: str, config: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A local folder or a Hub id, safetensors only."""
    local = is_local(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            revision=config.model_revision,
            dtype=_dtype(config),
            attn_implementation=config.attn_implementation,
            use_safetensors=True,
            trust_remote_code=False,
        )
        tokenizer = AutoTokenizer.from_pretrained(name, revision=config.model_revision, trust_remote_code=False)
    except UNREADABLE as error:
        raise unreadable(
            f"--model_name_or_path {name} cannot be loaded {'from this folder' if local else 'from the Hub'} "
            "(safetensors and GGUF only)",
            error,
        ) from error
    return model, tokenizer


def _load_with_adapter(folder: Path, config: ModelConfig) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The base model that an adapter names with the adapter on it, and the tokenizer of the base model."""
    try:
        base, tokenizer = load_model(base_config(folder, config))
        return load_adapter(base, folder), tokenizer
    except UNREADABLE as error:
        raise unreadable(f"--model_name_or_path {folder}", error) from error
