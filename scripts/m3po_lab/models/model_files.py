# SPDX-License-Identifier: Apache-2.0
"""Model files that are not what their names say: refused in one line before a library stumbles over them."""

import json
import struct
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from m3po_lab.core.errors import UserError, failure, short
from m3po_lab.core.hub import HUB_ERRORS

POINTER = b"version https://git-lfs.github.com/spec/"  # how a file begins that Git LFS has not fetched
OBJECTS = (  # JSON files of a model folder, each one object
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "m3po.json",
    "model.safetensors.index.json",
)
PROTOTYPE_MODULES = "m3po_modules.bin"
WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors")
TEXTS = ("*.jinja", "*.model", "merges.txt")
# What libraries raise on a model's files. Most read them without looking at what they are.
UNREADABLE = (
    *HUB_ERRORS,
    SafetensorError,
    StrictDataclassError,
    struct.error,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
)


def check_model_files(place: Path) -> None:
    """Refuse a model folder or GGUF file with a file in it that is cut short or none of its kind.

    Raises:
        UserError: names the file and the mend.
    """
    if place.is_file():
        _check_no_pointer(place)
        return
    if (place / PROTOTYPE_MODULES).exists():
        raise UserError(
            f"{place} has {PROTOTYPE_MODULES}, the prototype's modules of ASLR, and would be read as a plain model: "
            "take them as the start of a training with transformers.m3po.load_prototype_modules (docs/aslr.md), or "
            "move the file away to leave them out."
        )
    for file in [place / name for name in OBJECTS if (place / name).exists()]:
        _check_no_pointer(file)
        _check_object(file)
    for file in [file for pattern in TEXTS for file in place.glob(pattern)]:
        _check_no_pointer(file)
    for file in [file for pattern in WEIGHTS for file in place.glob(pattern)]:
        _check_no_pointer(file)
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{file} is cut short or no safetensors file ({short(error, 100)}): copy or download it again."
            ) from error


def _check_no_pointer(file: Path) -> None:
    if file.is_dir():
        raise UserError(f"{file} is a folder, where a file is wanted: copy or download it again.")
    with file.open("rb") as content:
        if content.read(len(POINTER)) == POINTER:
            raise UserError(
                f"{file} is a pointer of Git LFS and not the file itself: run 'git lfs install' and 'git lfs pull' in "
                "its folder, or download it."
            )


def _check_object(file: Path) -> None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{file} is cut short or no JSON file ({short(error, 100)}): copy or download it again."
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object: copy or download it again.")


def unreadable(what: str, error: Exception) -> Exception:
    """The one line for an error of a library on a model's files: a `UserError`; a full memory stays what it is.

    Args:
        what: begins the line.
    """
    if isinstance(error, RuntimeError | MemoryError) and failure(error):
        return error
    kind = "" if isinstance(error, HUB_ERRORS) else f"{type(error).__name__}: "  # else the text alone says little
    return UserError(f"{what}: {kind}{short(error).rstrip('.')}.")
