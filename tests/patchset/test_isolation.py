# SPDX-License-Identifier: Apache-2.0
"""The shell scripts and make run this project's code, whatever the caller's folder, variables and locale are."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hostile import hostile_folder

ROOT = Path(__file__).resolve().parents[2]
SHARED = ("isolated.sh", "overlay_tool.sh", "rebuild_env.sh", "run.sh")  # what the others call
COMMANDS = sorted(file.name for file in (ROOT / "scripts").glob("*.sh") if file.name not in SHARED)
PROBE = """
import json, os, subprocess, sys
told = {"argv": sys.argv[1:], "cwd": os.getcwd(), "path": sys.path, "optimize": sys.flags.optimize,
        "warnings": sys.warnoptions, "encoding": sys.stdout.encoding, "user": sys.flags.no_user_site,
        "kept": os.environ.get("PYTHONDONTWRITEBYTECODE"),
        "memory": [os.environ.get(f"MALLOC_{name}_THRESHOLD_") for name in ("MMAP", "TRIM")]}
if "child" not in sys.argv:
    told["child"] = json.loads(subprocess.check_output([sys.executable, "-m", "m3po_lab.probe", "child"]))
print(json.dumps(told))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the real shell scripts, an environment that is complete, and a module that tells what it sees."""
    root = tmp_path / "the chéckout"
    shutil.copytree(ROOT / "scripts", root / "scripts", ignore=lambda _, names: [n for n in names if n[-3:] != ".sh"])
    (root / "Makefile").write_text("env:\n\t@echo environment\n")
    (root / "lab/m3po_lab").mkdir(parents=True)
    (root / "lab/m3po_lab/probe.py").write_text(PROBE)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / ".venv"], check=True)
    (site,) = (root / ".venv/lib").glob("python*/site-packages")
    (site / "lab.pth").write_text("../../../../lab\n")
    return root


def test_a_script_and_what_it_starts_are_isolated_and_stay_in_the_callers_folder(
    checkout: Path, tmp_path: Path
) -> None:
    variables = os.environ | hostile_folder(tmp_path) | {"PYTHONDONTWRITEBYTECODE": "1"}
    variables = {name: value for name, value in variables.items() if not name.startswith("MALLOC_")}
    command = ["bash", os.path.relpath(checkout / "scripts/run.sh", tmp_path / "folder")]
    command += ["python", "-m", "m3po_lab.probe", "relative/path", "two words"]
    done = subprocess.run(command, cwd=tmp_path / "folder", env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert "environment" in done.stderr  # what completes the environment says is no result
    assert told["argv"] == ["relative/path", "two words"]
    for one in (told, told["child"]):
        assert one["cwd"] == str(tmp_path / "folder")
        assert not [entry for entry in one["path"] if entry in ("", ".") or str(tmp_path / "folder") in entry]
        assert not [entry for entry in one["path"] if str(tmp_path / "packages") in entry]
        assert (one["optimize"], one["warnings"], one["encoding"], one["user"]) == (0, [], "utf-8", 1)
        assert one["kept"] == "1"
        assert one["memory"] == [str(1 << 30)] * 2


def test_what_the_caller_has_set_for_glibc_is_kept(checkout: Path) -> None:
    variables = os.environ | {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TRIM_THRESHOLD_": ""}
    command = ["bash", checkout / "scripts/run.sh", "python", "-m", "m3po_lab.probe", "child"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["memory"] == ["4096", ""]


def test_every_command_runs_its_module_by_that_script(checkout: Path, tmp_path: Path) -> None:
    variables = os.environ | hostile_folder(tmp_path)
    (checkout / ".venv/bin/python").unlink()
    (checkout / ".venv/bin/python").write_text('#!/bin/sh\necho "$PYTHONSAFEPATH$PYTHONPATH$PYTHONHOME" "$@"\n')
    (checkout / ".venv/bin/python").chmod(0o755)
    for name in COMMANDS:
        command = ["bash", checkout / "scripts" / name, "a file.yaml", "--flag", ""]
        done = subprocess.run(command, cwd=tmp_path / "folder", env=variables, capture_output=True, text=True)
        assert re.fullmatch(r"1 -m m3po_lab\.[\w.]+ a file\.yaml --flag \n", done.stdout), (name, done.stderr)


def test_what_make_runs_is_isolated_too() -> None:
    text = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z-]+):.*## ", text, flags=re.MULTILINE)
    words = ["make", "-n", *targets, "UPSTREAM=trl", "VERSION=1", "CHECKPOINT=a", "OUT=b"]
    env = {key: value for key, value in os.environ.items() if key not in {"MAKEFLAGS", "PYTHON", "EXTRA"}}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if re.search("python|patchset", line)]
    assert len(lines) > 20
    start = re.compile(r"\s*(; )?(\. scripts/isolated\.sh; |bash scripts/overlay_tool\.sh )")
    assert [line for line in lines if not start.match(line)] == []
