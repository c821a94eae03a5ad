# SPDX-License-Identifier: Apache-2.0
"""check and table: the proof from wheels alone, and pages whose generated blocks cannot go stale."""

from __future__ import annotations

import os
import sys

import pytest

from patchset import pins, table


@pytest.fixture
def with_python(project):
    """A project whose .venv is this Python, so that check's import step runs."""
    python = project.root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return project


def test_check_proves_the_series_without_vendor_and_leaves_nothing_behind(
    with_python, one, two, crlf, tmp_path, monkeypatch
):
    (tmp_path / "temp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    with_python.series(("one.patch", one), ("two.patch", two), ("dos.patch", crlf))
    result = with_python.ok("check")
    assert "alpha 1.0: ok (3 patches" in result.out and "imports: ok (3 modules)" in result.out
    assert not (with_python.root / "vendor").exists() and os.listdir(tmp_path / "temp") == []


def test_check_without_an_environment_says_that_the_imports_were_left_out(project, one, monkeypatch):
    project.series(("one.patch", one))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "imports: left out" in project.ok("check").out


def test_a_patch_that_does_not_round_trip_is_drift(project, one):
    project.series(("one.patch", one.replace(b"@@ -1,5 +1,5 @@", b"@@ -1,5 +1,5 @@ edited by hand")))
    result = project.run("check")
    assert result.code == 1 and "does not round-trip" in result.err and "changed: patches/alpha/one.patch" in result.err


def test_a_patch_that_breaks_the_syntax_is_drift(project, one):
    project.series(("one.patch", one.replace(b"+line_1 = 11", b"+line_1 = (")))
    result = project.run("check")
    assert result.code == 1 and "src/alpha/core.py does not compile" in result.err


def test_a_new_file_that_breaks_the_syntax_is_drift(project):
    file = project.root / "overlay" / "alpha" / "src" / "alpha" / "more.py"
    file.parent.mkdir(parents=True)
    file.write_text("def\n")
    result = project.run("check")
    assert result.code == 1 and "src/alpha/more.py does not compile" in result.err


def test_a_patched_module_that_cannot_be_imported_is_drift(with_python, tools):
    new = tools["TEN"].replace(b"line_1 = 1\n", b"import no_such_module\n")
    with_python.series(("one.patch", tools["mail"](tools["diff"]("src/alpha/core.py", tools["TEN"], new))))
    result = with_python.run("check")
    assert result.code == 1 and "imports: ModuleNotFoundError: No module named 'no_such_module'" in result.err


def test_imports_come_from_the_patched_tree_even_when_another_copy_is_installed(
    with_python, one, tmp_path, monkeypatch
):
    (tmp_path / "other" / "alpha").mkdir(parents=True)
    (tmp_path / "other" / "alpha" / "__init__.py").write_text("raise SystemExit('the wrong copy')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "other"))
    with_python.series(("one.patch", one))
    assert "imports: ok" in with_python.ok("check").out


def test_table_names_every_file_with_its_counts_patch_and_why(project, one, crlf):
    project.series(("one.patch", one), ("dos.patch", crlf))
    file = project.root / "overlay" / "alpha" / "src" / "alpha" / "more.py"
    file.parent.mkdir(parents=True)
    file.write_text('"""What it is | for.\n\nMore."""\n')
    text = project.ok("table").out
    assert "### alpha\n\n1.0: 2 patches, +2 −2 lines; 1 new file\n" in text
    assert "| `src/alpha/core.py` | 1 | 1 | [one](/patches/alpha/one.patch) | core: change a line |" in text
    assert "| `src/alpha/more.py` | new | | [overlay](/overlay/alpha/src/alpha/more.py) | What it is \\| for. |" in text
    assert "### beta\n\n1.0: 0 patches, +0 −0 lines; 0 new files\n" in text


def test_the_summary_has_one_line_for_each_upstream(project, one):
    project.series(("one.patch", one))
    assert table.summary(pins.load(project.root)) == (
        "- [**alpha 1.0**](patches/README.md#alpha): 1 patch, +1 −1 lines; 0 new files\n"
        "- [**beta 1.0**](patches/README.md#beta): 0 patches, +0 −0 lines; 0 new files\n"
    )


@pytest.mark.parametrize(
    ("page", "line"), [("README.md", "**alpha 1.0**"), ("patches/README.md", "core: change a line")]
)
def test_a_generated_block_that_is_out_of_date_fails_check_and_export_renews_it(project, one, page, line):
    file, (begin, end) = project.root / page, table.marks(page)
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"above\n{begin}\nold\n{end}\nbelow\n")
    project.series(("one.patch", one))
    result = project.run("check")
    assert result.code == 1 and f"{page}: the list of patches is out of date" in result.err
    project.ok("apply")
    assert f"{page}: list of patches written" in project.ok("export").out
    text = file.read_text()
    assert text.startswith("above\n") and text.endswith("below\n") and line in text and "old" not in text
    project.ok("check")
