# SPDX-License-Identifier: Apache-2.0
"""Runs a script of this folder in a process of its own, on our checkouts or on the pristine trees of the upstreams."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
VENDOR = HERE.parents[1] / "vendor"
# Upstream -> where its package lies in `vendor/`.
PACKAGES = {"transformers": "transformers/src", "trl": "trl", "unsloth": "unsloth", "unsloth_zoo": "unsloth_zoo"}


def unpack(folder: Path) -> list[Path]:
    """The pristine trees of all upstreams, unpacked under `folder`; the paths that their packages lie in."""
    for name in PACKAGES:
        (folder / name).mkdir(parents=True)
        tree = ["git", "-C", VENDOR / name, "archive", "refs/patchset/pristine", "--", ".", ":(exclude)studio"]
        with subprocess.Popen(tree, stdout=subprocess.PIPE) as archive:
            subprocess.run(["tar", "-x", "-C", folder / name], stdin=archive.stdout, check=True)
        assert archive.returncode == 0
    return [folder / place for place in PACKAGES.values()]


def run(script: str, folder: Path, pristine: bool) -> Any:
    """What a script writes to the file it is given, in a process without the variables of our stand-ins."""
    (folder / "compiled").mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("UNSLOTH", "TRITON"))}
    environment |= {"UNSLOTH_COMPILE_LOCATION": str(folder / "compiled"), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONSAFEPATH", None)  # the script imports its neighbour
    if pristine:
        environment["PYTHONPATH"] = os.pathsep.join(map(str, unpack(folder / "pristine")))
    command = [sys.executable, HERE / script, folder / "result.pt"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "result.pt", weights_only=True)
