# SPDX-License-Identifier: Apache-2.0
"""What tells one model from another: the content of its files, its revision on the Hub, or its version."""

import hashlib
from importlib import metadata
from pathlib import Path

from trl import ModelConfig

from m3po_lab.core.errors import UserError, one_line
from m3po_lab.core.identity import short_digest
from m3po_lab.models.adapters import base_config
from m3po_lab.models.embedded import EMBEDDED_DISTRIBUTION, EMBEDDED_MODEL

MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt")  # what a model folder's outputs depend on


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
    parts = [model_digest(base_config(path, config))] if (path / "adapter_config.json").is_file() else []
    for file in files:
        with file.open("rb") as content:
            parts.append(f"{file.name} {hashlib.file_digest(content, 'sha256').hexdigest()}")
    return "\n".join(parts)


def named_model(name: str, config: ModelConfig) -> str:
    """A local model's name with the digest of its weights and tokenizer; of the embedded one with its version.

    Raises:
        UserError: one of its files cannot be read.
    """
    if name == EMBEDDED_MODEL:
        return f"{name} (version {model_digest(config).removeprefix(name).strip()})"
    if not Path(name).exists():
        return name
    try:
        return f"{name} (sha256 {short_digest(model_digest(config))})"
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--model_name_or_path {name}: {one_line(error)}") from error
