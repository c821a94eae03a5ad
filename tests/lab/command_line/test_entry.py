# SPDX-License-Identifier: Apache-2.0
"""Every command stops with one line where a library lacks our patches, and prints text that any terminal takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from m3po_lab.command_line.entry import unpatched

LAB = Path(__file__).resolve().parents[3] / "scripts/m3po_lab"
MAIN = 'if __name__ == "__main__":\n'
ENTRIES = [file.stem for file in sorted(LAB.glob("*.py")) if MAIN in file.read_text(encoding="utf-8")]


def run(words: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], env=os.environ | variables, capture_output=True, text=True, encoding="utf-8"
    )


def test_the_commands_are_found() -> None:
    assert {"train", "launch", "sweep", "compare", "eval_gsm8k", "pretrain_pair", "pretrain"} <= set(ENTRIES)


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_command_on_a_library_without_our_patches_is_one_line(entry: str, tmp_path: Path) -> None:
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers/__init__.py").write_text("__version__ = '5.17.0'\n")
    done = run(["-m", f"m3po_lab.{entry}", "--help"], PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"error: transformers in {tmp_path / 'transformers'} lacks this project's patches")
    assert "bash scripts/rebuild_env.sh" in done.stderr


def test_each_library_is_looked_at_and_none_is_imported(tmp_path: Path) -> None:
    assert unpatched() is None
    for name, ours in {"transformers": "m3po", "trl": "trainer/m3po"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('imported')\n")
        code = "from m3po_lab.command_line.entry import unpatched; print(unpatched())"
        assert f"error: {name} in" in f"error: {run(['-c', code], PYTHONPATH=str(tmp_path)).stdout}"
        (tmp_path / name / ours).mkdir(parents=True)
    assert run(["-c", code], PYTHONPATH=str(tmp_path)).stdout == "None\n"


def test_a_letter_that_the_locale_lacks_does_not_end_a_command() -> None:
    code = "from m3po_lab.command_line.entry import start; start(lambda: print('\\u03bb = 0.1, \\udcff') or 0)"
    variables = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii:strict"}
    done = run(["-c", code], **variables)
    assert (done.returncode, done.stdout, done.stderr) == (0, "? = 0.1, ?\n", "")
