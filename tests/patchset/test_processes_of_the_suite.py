# SPDX-License-Identifier: Apache-2.0
"""tests/unsloth runs in a process of its own: what tests/conftest.py collects, and what `make test` runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A suite of two tests with the conftest.py of this one."""
    (tmp_path / "tests/unsloth").mkdir(parents=True)
    (tmp_path / "tests/reference").mkdir()
    for name in ("conftest.py", "reference/families.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests" / name)
    for name in ("test_other.py", "unsloth/test_fast.py"):
        (tmp_path / "tests" / name).write_text("def test_it() -> None: ...\n")
    (tmp_path / "pyproject.toml").write_text(
        '[tool.pytest.ini_options]\ntestpaths = ["tests"]\npythonpath = ["tests"]\naddopts = "-q"\n'
    )
    return tmp_path


def collect(folder: Path, *arguments: str) -> tuple[int, list[str]]:
    """The exit code and the lines of `pytest --collect-only`, called in `folder`."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", *arguments]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # they take longer than all else here
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode, [line for line in done.stdout.splitlines() if "::" in line or line.startswith("ERROR")]


OTHER, FAST = "tests/test_other.py::test_it", "tests/unsloth/test_fast.py::test_it"


@pytest.mark.parametrize(
    ("folder", "arguments", "collected"),
    [
        (".", [], [OTHER]),
        (".", ["tests"], [OTHER]),
        (".", [FAST], [FAST]),
        ("tests", ["unsloth"], [FAST]),
    ],
)
def test_unsloth_is_collected_only_when_a_path_asks_for_it(
    suite: Path, folder: str, arguments: list[str], collected: list[str]
) -> None:
    assert collect(suite / folder, *arguments) == (0, collected)


def test_unsloth_and_the_rest_in_one_process_is_one_clear_line(suite: Path) -> None:
    line = "ERROR: tests/unsloth needs a process of its own: run `pytest tests/unsloth` by itself"
    assert collect(suite, "tests/unsloth", "tests") == (pytest.ExitCode.USAGE_ERROR, [line])


def test_make_test_adds_the_extra_even_after_targets_without_it_and_runs_two_processes() -> None:
    env = {key: value for key, value in os.environ.items() if key not in {"MAKEFLAGS", "PYTHON", "EXTRA"}}
    done = subprocess.run(["make", "-n", "lint", "test"], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if "patchset.environment" in line or "pytest" in line]
    assert [re.split(r"python |overlay_tool\.sh ", line)[-1].strip() for line in lines] == [
        "patchset.environment",
        "patchset.environment --extra=unsloth",
        "-m pytest -n 2 --dist loadfile",
        "-m pytest tests/unsloth",
    ]
