# SPDX-License-Identifier: Apache-2.0
"""`m3po.json`: what a checkpoint is, beside its weights, adapter or full model.

A checkpoint that does not carry its mode cannot be evaluated as it was trained; so every save of the trainer writes the
mode, every number of it, the answer marker, the sampling temperature and the versions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHECKPOINT_FILE = "m3po.json"


def write_checkpoint_info(folder: str | Path, info: dict[str, Any]) -> Path:
    """Writes `info` (plain JSON values, with at least `mode`) as `m3po.json` into `folder`; returns its path."""
    if "mode" not in info:
        raise ValueError(f"{CHECKPOINT_FILE} must say the mode of the checkpoint; add the key 'mode'.")
    path = Path(folder) / CHECKPOINT_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")  # a kill leaves the old file or the new one, never half of one
    part.write_text(json.dumps(info, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    part.replace(path)
    return path


def read_checkpoint_info(folder: str | Path) -> dict[str, Any]:
    """Reads `m3po.json` of a checkpoint folder.

    Raises:
        FileNotFoundError: the folder has no `m3po.json`, so it is not a checkpoint of this overlay.
        ValueError: the file is not a JSON object with a `mode`.
    """
    path = Path(folder) / CHECKPOINT_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CHECKPOINT_FILE}: it was not saved by this overlay's trainer.")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}).") from error
    if not isinstance(info, dict) or "mode" not in info:
        raise ValueError(f"{path} does not say the mode of the checkpoint.")
    return info
