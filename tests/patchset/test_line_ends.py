# SPDX-License-Identifier: Apache-2.0
"""A clone holds the bytes of this checkout whatever line ends git is told: they are run, hashed and applied."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def git(folder: Path, *words: str) -> bytes:
    return subprocess.run(["git", "-C", folder, *words], check=True, capture_output=True).stdout


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files as they lie here, committed byte for byte."""
    folder = tmp_path_factory.mktemp("repository")
    for name in filter(None, git(ROOT, "ls-files", "-z").decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    git(folder, "init", "-q")
    git(folder, "-c", "core.autocrlf=false", "add", "-A", "-f")
    git(folder, "-c", "user.name=a", "-c", "user.email=a@b.org", "commit", "-q", "--no-gpg-sign", "-m", "all")
    return folder


@pytest.mark.parametrize("settings", [("autocrlf=true",), ("autocrlf=true", "eol=crlf"), ("eol=crlf",)], ids=" ".join)
def test_a_clone_has_the_same_bytes_whatever_line_ends_git_is_told(
    repository: Path, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    (tmp_path / "attributes").write_text("* text=auto\n")  # without it core.eol says nothing
    told = [word for setting in settings for word in ("-c", f"core.{setting}")]
    told += ["-c", f"core.attributesFile={tmp_path / 'attributes'}"]
    git(tmp_path, *told, "clone", "-q", str(repository), "clone")
    names = git(repository, "ls-files", "-z").decode().strip("\0").split("\0")
    other = [name for name in names if (tmp_path / "clone" / name).read_bytes() != (ROOT / name).read_bytes()]
    assert len(names) > 300 and other == []
