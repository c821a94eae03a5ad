# SPDX-License-Identifier: Apache-2.0
"""What trains a run (`--engine`): TRL's trainer as it is, or Unsloth, which puts faster code for GPUs in its place.

Importing Unsloth changes the other libraries for the whole process, and it has to be the first of them. So the engine
is chosen from the words of the command and its YAML, before TRL can parse them; what TRL has parsed is checked again.
Nothing large is imported here at the top.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from m3po_lab.core.config_files import DEFAULT_CONFIG, find_config, split_config
from m3po_lab.core.errors import PROJECT_ROOT, UserError, one_line
from m3po_lab.core.files import read_json
from m3po_lab.core.provenance import source_digest

ENGINES = ("auto", "unsloth", "trl")
CAPABILITY = (7, 0)  # the least that Unsloth's kernels are for
HALF = {"bfloat16": "bf16", "float16": "fp16"}  # dtype of the weights -> the autocast that goes with it
# What the choice looks at, with TRL's defaults. `bf16` of None is true unless `fp16` is.
LOOKED_AT: dict[str, Any] = {
    "engine": "auto",
    "model_name_or_path": None,
    "dtype": "float32",
    "bf16": None,
    "fp16": False,
    "use_cpu": False,
    "use_peft": False,
    "use_dora": False,
    "lora_target_modules": None,
    "lora_modules_to_save": None,
    "lora_target_parameters": None,
    "load_in_4bit": False,
    "load_in_8bit": False,
    "attn_implementation": None,
    "rollout_engine": "generate",
    "use_vllm": False,
    "beta": 0.0,
    "gating_training": "embeddings",
}
LISTS = ("lora_target_modules", "lora_modules_to_save")
# What our part of the code lies in that Unsloth's trainer is generated from.
SOURCES = ("patches", "overlay", "overlay.toml")


@dataclass(frozen=True)
class Engine:
    """The engine of a run: `trl` or `unsloth`, and why it is this one."""

    name: str
    why: str

    @property
    def version(self) -> str:
        """The version of the distribution of that name."""
        return metadata.version(self.name)

    def describe(self) -> str:
        """For the start line, e.g. `engine trl 1.15.0 (auto: this machine has no GPU)`."""
        return f"engine {self.name} {self.version} ({self.why})"


TRL = Engine("trl", "as asked")


def choose_engine(words: list[str]) -> Engine:
    """The engine that the words of a command and its YAML ask for; `auto` takes Unsloth where it can serve.

    Raises:
        UserError: the engine is unknown, or Unsloth is asked for and cannot train this here.
    """
    values = early_values(words)
    name = str(values["engine"])
    if name not in ENGINES:
        raise UserError(f"--engine {name} is unknown; give one of {', '.join(ENGINES)}.")
    if name == "trl":
        return TRL
    why = machine_obstacle() or next(flag_obstacles(values), None)
    if name == "unsloth":
        if why is not None:
            raise UserError(f"--engine unsloth: {why}; or leave --engine out, which then takes trl.")
        return Engine("unsloth", "as asked")
    if why is None and not _true(values["use_peft"]):
        why = "without LoRA Unsloth runs the same forwards"
    return Engine("unsloth", "auto: LoRA on a supported GPU") if why is None else Engine("trl", f"auto: {why}")


def early_values(words: list[str]) -> dict[str, Any]:
    """The values of `LOOKED_AT`, as texts or as the YAML has them; what cannot be read is left for TRL to refuse."""
    config_name, rest = split_config(words)
    try:
        content = yaml.safe_load(find_config(config_name or DEFAULT_CONFIG).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError):
        content = None
    in_yaml = content if isinstance(content, dict) else {}
    values = {**LOOKED_AT, **{name: value for name, value in in_yaml.items() if name in LOOKED_AT}}
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name in LOOKED_AT:
        how: dict[str, Any] = {"nargs": "*"} if name in LISTS else {"nargs": "?", "const": True}
        parser.add_argument(f"--{name}", **how)
    return values | vars(parser.parse_known_args(rest)[0])


def _true(value: Any) -> bool:
    return str(value).lower() in ("true", "t", "yes", "y", "1")  # as transformers' HfArgumentParser


def machine_obstacle() -> str | None:
    """Why Unsloth cannot train on this machine or in this environment; None where it can."""
    import torch

    # What `make env EXTRA=unsloth` would not mend comes first.
    if os.environ.get("ACCELERATE_USE_CPU") == "true" or not torch.cuda.is_available():
        return "this machine has no GPU that Unsloth supports"
    if torch.cuda.get_device_capability() < CAPABILITY:
        have, need = (".".join(map(str, pair)) for pair in (torch.cuda.get_device_capability(), CAPABILITY))
        return f"the GPU has compute capability {have} and Unsloth needs {need}"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return "a run of several processes is TRL's: unset ACCELERATE_CONFIG"
    if find_spec("unsloth") is None or find_spec("bitsandbytes") is None:
        return "the environment lacks Unsloth: make env EXTRA=unsloth"
    return None


def flag_obstacles(values: Mapping[str, Any]) -> Iterator[str]:
    """What the flags of a run ask for that Unsloth would do otherwise or not at all, with the mend; the first first.

    Args:
        values: of the names in `LOOKED_AT`, as texts or parsed.
    """
    name, dtype = values["model_name_or_path"], str(values["dtype"])
    fp16 = _true(values["fp16"])
    bf16 = not fp16 if values["bf16"] is None else _true(values["bf16"])
    if _true(values["use_cpu"]):
        yield "--use_cpu true needs trl: leave it out"
    if dtype not in HALF or not {"bf16": bf16, "fp16": fp16}[HALF[dtype]]:
        yield f"it trains in half precision, and --dtype is {dtype}: set --dtype bfloat16 --bf16 true"
    if name is not None and (Path(str(name)) / "adapter_config.json").is_file():
        yield f"--model_name_or_path {name} is a LoRA adapter, which trl goes on from: merge it (make export-model)"
    if name is not None and (read_json(Path(str(name)) / "config.json") or {}).get("mhc_enabled"):
        yield f"--model_name_or_path {name} has hyper-connections, which its fast paths leave out: train it with trl"
    if values["rollout_engine"] != "generate":
        yield f"--rollout_engine {values['rollout_engine']} is not for Unsloth here: leave it out"
    for flag in ("use_dora", "use_vllm", "load_in_8bit"):
        if _true(values[flag]):
            yield f"--{flag} true is not for Unsloth here: leave it out"
    for flag in ("lora_target_parameters", "attn_implementation"):
        if values[flag] is not None:
            yield f"--{flag} is not for Unsloth here: leave it out"
    targets, whole = (str(values[flag]) for flag in LISTS)
    for name in ("embed_tokens", "lm_head"):
        if name in targets:
            yield f"--lora_target_modules {name}: it would train that whole; train it with trl"
    if "embed_tokens" in whole and "lm_head" in whole:
        yield "--lora_modules_to_save embed_tokens lm_head: it would tie the two; train them with trl"
    if _true(values["load_in_4bit"]) and not _true(values["use_peft"]):
        yield "--load_in_4bit true is for LoRA: set --use_peft true"
    if float(values["beta"]) > 0 and not _true(values["use_peft"]):
        yield "--beta above 0 needs a second model without LoRA: set --use_peft true"
    if values["gating_training"] == "logits":
        yield "--gating_training logits needs distributions that Unsloth never makes: set embeddings"


def check_flags(engine: Engine, groups: Iterable[Any]) -> None:
    """Refuse, of the parsed arguments, what the run's engine cannot do; they are what counts.

    Args:
        groups: the dataclasses of all arguments.

    Raises:
        UserError: for the first such flag.
    """
    flags = {entry.name: getattr(group, entry.name) for group in groups for entry in fields(group)}
    if engine.name == "trl":
        if flags["load_in_4bit"]:
            raise UserError(f"--load_in_4bit true needs Unsloth, and this run has {engine.describe()}; leave it out.")
        return
    for why in flag_obstacles(flags):
        raise UserError(f"--engine unsloth: {why}; or set --engine trl.")


def enter(engine: Engine) -> None:
    """Import Unsloth, if it is the engine, before the libraries that it changes.

    The trainer it writes lies in a folder of its own for each state of our patches, so that it can never be that of
    others. It sends no statistics.

    Raises:
        UserError: it cannot be imported, or its trainer is not in TRL's place.
    """
    if engine.name != "unsloth":
        return
    os.environ["UNSLOTH_COMPILE_LOCATION"] = str(trainer_cache())
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    try:
        import unsloth  # noqa: F401
    except (ImportError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"--engine unsloth cannot be imported here: {one_line(error)}; set --engine trl.") from error
    import trl

    if trl.GRPOTrainer.__name__ != "UnslothGRPOTrainer":
        raise UserError("--engine unsloth: it did not put its GRPOTrainer in TRL's place; set --engine trl.")


def trainer_cache() -> Path:
    """The folder for the trainers that Unsloth generates, keyed by our patches and by the code they lie on."""
    digest = hashlib.sha256(source_digest(PROJECT_ROOT, SOURCES).encode())
    for package in ("trl", "unsloth", "unsloth_zoo"):
        spec = find_spec(package)
        digest.update(f"{package} {spec.origin if spec else None}\0".encode())
    cache = PROJECT_ROOT / ".cache"
    if not os.access(cache if cache.exists() else PROJECT_ROOT, os.W_OK):  # another user's checkout
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "m3po-overlay")
    return cache / "unsloth" / digest.hexdigest()[:16]
