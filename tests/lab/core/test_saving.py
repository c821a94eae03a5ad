# SPDX-License-Identifier: Apache-2.0
"""What is saved can be read by whom the umask lets: weights too, wherever they are written."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from m3po_lab.core.saving import obey_umask

LAB = Path(__file__).resolve().parents[3] / "scripts/m3po_lab"


@pytest.fixture(params=[0o022, 0o027, 0o002, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> dict[str, str]:
    """path -> permissions of every file below `folder`."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): oct(path.stat().st_mode & 0o777) for path in files}


def test_weights_get_the_permissions_of_the_files_beside_them(tmp_path: Path, umask: int) -> None:
    for name in ("model.safetensors", "adapter_model.safetensors", "model-00001-of-00002.safetensors"):
        save_file({"a": torch.zeros(2)}, tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    obey_umask(tmp_path)
    assert set(modes(tmp_path).values()) == {oct(0o666 & ~umask)}
    assert os.umask(umask) == umask  # and the umask is as it was


def test_every_place_that_saves_weights_gives_them_these_permissions() -> None:
    saves = re.compile(r"\.save_pretrained\(|\.save_model\(|save_file\(")
    saving = [file for file in sorted(LAB.rglob("*.py")) if saves.search(file.read_text(encoding="utf-8"))]
    assert len(saving) >= 3
    assert [file.name for file in saving if "obey_umask" not in file.read_text(encoding="utf-8")] == []
