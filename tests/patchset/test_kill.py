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


@pytest.mark.parametrize("step", [step for step in common.STEPS if step not in ONLY_LINKS])
def test_killed_at_a_step_of_a_rebuild(changed, step):
    project, wanted = changed
    process = project.start("apply", "--discard", PATCHSET_KILL_AT=step)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    recovered(project, wanted)


@pytest.mark.parametrize("step", ONLY_LINKS)
def test_killed_while_only_new_files_change(project, step):
    file = project.root / "overlay" / "alpha" / "src" / "alpha" / "more.py"
    file.parent.mkdir(parents=True)
    file.write_text("NEW = 3\n")
    project.ok("apply")
    file.rename(file.with_name("renamed.py"))
    process = project.start("apply", PATCHSET_KILL_AT=step)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    project.ok("apply")
    assert project.ok("status").code == 0 and project.vendor("src/alpha/renamed.py").read_text() == "NEW = 3\n"
    assert not os.path.lexists(project.vendor("src/alpha/more.py"))


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
