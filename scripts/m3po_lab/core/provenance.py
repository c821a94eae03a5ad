# SPDX-License-Identifier: Apache-2.0
"""Where a result comes from: the commit of this project, its code, and how the training was distributed."""

import hashlib
import subprocess
from collections.abc import Iterable
from pathlib import Path

from accelerate import Accelerator

CODE = ("constraints.txt", "overlay.toml", "overlay", "patches", "scripts/m3po_lab")  # what the numbers of a run go by


def git_state(root: Path) -> tuple[str | None, bool | None]:
    """The commit checked out in `root` and whether files differ from it; (None, None) when it is no git checkout."""
    try:
        commit = _git(root, "rev-parse", "HEAD").strip()
        return commit, bool(_git(root, "status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def source_digest(root: Path, names: Iterable[str]) -> str:
    """SHA-256 of files below `root`, by name and content; of a folder all files in it."""
    digest = hashlib.sha256()
    for name in names:
        place = root / name
        for file in [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file()):
            if "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


def distribution(accelerator: Accelerator) -> str:
    """How the training is distributed: 'single process', or accelerate's name of it, e.g. 'multi_gpu', 'fsdp'."""
    kind = accelerator.distributed_type.value.lower()
    return "single process" if kind == "no" else kind


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *words],
        check=True,
        capture_output=True,
        text=True,
        timeout=20,
        stdin=subprocess.DEVNULL,
    )
    return done.stdout
