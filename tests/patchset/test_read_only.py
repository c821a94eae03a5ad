# SPDX-License-Identifier: Apache-2.0
"""A user who may not write in a complete checkout: the tool compares as ever, and refuses the rest in one line."""

from __future__ import annotations

import subprocess

import pytest

from patchset.common import Refused, lock


def tell(project, prefix: list[str], *args: str) -> tuple[int, str]:
    """Exit code and stderr of the tool, started as that user."""
    process = project.start(*args, prefix=prefix)
    said = process.communicate()[1].decode()
    return process.returncode, said


@pytest.fixture(params=["with its lock file", "without .cache"])
def complete(project, request, one, reader):
    """An applied checkout with its permissions to write taken away."""
    project.series(("one.patch", one))
    (project.root / "overlay/alpha/src/alpha").mkdir(parents=True)
    (project.root / "overlay/alpha/src/alpha/ours.py").write_text('"""Ours."""\n')
    project.ok("apply")
    if request.param == "without .cache":
        subprocess.run(["rm", "-r", project.root / ".cache"], check=True)
    subprocess.run(["chmod", "-R", "a-w", project.root], check=True)
    return project


def test_a_complete_checkout_needs_no_write(complete, reader) -> None:
    before = {name: complete.stamps(name) for name in ("alpha", "beta")}
    for command in (["status"], ["apply"], ["status", "--json"]):
        assert tell(complete, reader, *command) == (0, "")
    assert {name: complete.stamps(name) for name in ("alpha", "beta")} == before


def test_an_edit_is_found_without_a_write(complete, reader) -> None:
    core = complete.vendor("src/alpha/core.py")
    core.chmod(0o644)
    core.write_bytes(core.read_bytes().replace(b"line_5 = 5", b"line_5 = 6"))
    core.chmod(0o444)
    assert tell(complete, reader, "status")[0] == 1
    code, said = tell(complete, reader, "apply")
    assert (code, "vendor/alpha holds edits" in said) == (2, True)


def test_what_has_to_be_written_is_refused_in_one_line(complete, reader) -> None:
    fresh = complete.root / "overlay/alpha/src/alpha/more.py"
    fresh.parent.chmod(0o755)
    fresh.write_text("MORE = 1\n")
    code, said = tell(complete, reader, "apply")
    assert (code, said.count("\n")) == (2, 1), said
    assert said.endswith("Permission denied; the checkout's owner has to call this\n")


def test_a_reader_waits_for_who_writes(complete, reader) -> None:
    if not (complete.root / ".cache").exists():
        return
    (complete.root / ".cache/patchset.lock").chmod(0o644)
    with lock(complete.root):
        (complete.root / ".cache/patchset.lock").chmod(0o444)
        code, said = tell(complete, reader, "status")
    assert (code, "another patchset command is at work" in said) == (2, True)
    with lock(complete.root), pytest.raises(Refused, match="at work"), lock(complete.root, wait=0):
        pass
