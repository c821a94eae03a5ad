# SPDX-License-Identifier: Apache-2.0
"""kill -9 at every step boundary of apply, and at ten random moments: the next call always ends right."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from patchset import common

ONLY_LINKS = ("links-synced", "state-written")


@pytest.fixture
def changed(project, one, crlf):
    """A project applied once, then edited in vendor/, in patches/ and in overlay/; returns it and the tree to reach."""
    project.series(("one.patch", one))
    file = project.root / "overlay" / "alpha" / "src" / "alpha" / "more.py"
    file.parent.mkdir(parents=True)
    file.write_text("NEW = 3\n")
    project.series(("one.patch", one), ("dos.patch", crlf))
    project.ok("apply")
    wanted = project.tree()
    project.series(("one.patch", one))
    project.ok("apply")
    project.edit("src/alpha/core.py", b"line_8", b"MINE_8")
    project.series(("one.patch", one), ("dos.patch", crlf))
    return project, wanted


def recovered(project, wanted):
    """Whatever was left behind, the next apply reaches the wanted tree, and the discarded edit is in a backup."""
    project.ok("apply", "--discard")
    assert project.tree() == wanted and project.ok("status").code == 0
    project.ok("export", "--check")
    assert os.listdir(project.root / "vendor" / ".patchset") == []
    refs = project.git("for-each-ref", "--format=%(refname)", "refs/patchset/backup").split()
    assert any("MINE_8" in project.git("show", f"{ref}:src/alpha/core.py") for ref in refs)


def test_killed_at_each_step_of_a_rebuild(changed, one, crlf):
    """Of a first kill and of those after it: what one left behind is there when the next begins."""
    project, wanted = changed
    for step in common.STEPS:
        if step in ONLY_LINKS:
            continue
        process = project.start("apply", "--discard", PATCHSET_KILL_AT=step)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, step
        recovered(project, wanted)
        project.series(("one.patch", one))
        project.ok("apply")
        project.edit("src/alpha/core.py", b"line_8", b"MINE_8")
        project.series(("one.patch", one), ("dos.patch", crlf))


def test_killed_while_only_new_files_change(project):
    file = project.root / "overlay" / "alpha" / "src" / "alpha" / "more.py"
    file.parent.mkdir(parents=True)
    file.write_text("NEW = 3\n")
    project.ok("apply")
    for step in ONLY_LINKS:
        before, file = file, file.rename(file.with_name(f"{step.replace('-', '_')}.py"))
        process = project.start("apply", PATCHSET_KILL_AT=step)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, step
        project.ok("apply")
        assert project.ok("status").code == 0
        assert project.vendor(f"src/alpha/{file.name}").read_text() == "NEW = 3\n"
        assert not os.path.lexists(project.vendor(f"src/alpha/{before.name}"))


@pytest.mark.parametrize("step", ["git-made", "pristine-built", "tree-staged", "new-moved-in"])
def test_killed_during_the_very_first_apply(project, one, step):
    project.series(("one.patch", one))
    project.start("apply", PATCHSET_KILL_AT=step).communicate()
    project.ok("apply")
    assert project.ok("status").code == 0 and b"line_1 = 11" in project.vendor("src/alpha/core.py").read_bytes()


def test_killed_at_ten_random_moments(changed):
    project, wanted = changed
    began = time.monotonic()
    project.start("status").communicate()
    project.start("check", "--upstream", "alpha").communicate()
    span = time.monotonic() - began
    chance = random.Random(2026)
    for _ in range(10):
        process = project.start("apply", "--discard")
        time.sleep(chance.uniform(0.05, span))
        if chance.random() < 0.5:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()  # its git children live on for a moment and keep the lock
        process.communicate()
        recovered_once(project, wanted)
    recovered(project, wanted)


def recovered_once(project, wanted):
    """Status works, apply reaches the tree; then the next round's edit is made."""
    assert project.run("status").code in (0, 1)
    project.ok("apply", "--discard")
    assert project.tree() == wanted
    project.edit("src/alpha/core.py", b"line_8", b"MINE_8")
