# SPDX-License-Identifier: Apache-2.0
"""export: commits in vendor/ come back as patches, byte for byte; each edit changes only its own patch."""

from __future__ import annotations

import random
import re
import subprocess

import pytest


def test_export_after_apply_changes_no_byte_and_no_mtime(project, one, two, crlf):
    project.series(("one.patch", one), ("two.patch", two), ("dos.patch", crlf))
    project.ok("apply")
    before, times = project.patches(), project.stamps()
    stamps = {path: (project.root / "patches" / path).stat().st_mtime_ns for path in before}
    project.ok("export", "--check")
    assert project.ok("export").out.count("no changes") == 2
    assert project.patches() == before and project.stamps() == times
    assert stamps == {path: (project.root / "patches" / path).stat().st_mtime_ns for path in before}


@pytest.mark.parametrize(
    ("subject", "author"),
    [
        ("core: [tag] kept as it is", "Zoë Ünïcode <z@example.org>"),
        ("core: " + "a very long subject line that a mail header has to fold " * 3, "Plain <p@example.org>"),
        ("core: ein Gruß in UTF-8", "O'Neil, Jr. <o@example.org>"),
    ],
)
def test_odd_subjects_survive_a_round_trip_and_the_author_is_the_neutral_one(project, subject, author):
    project.ok("apply")
    project.edit("src/alpha/core.py", b"line_5 = 5", b"line_5 = 55")
    project.commit(subject.strip(), f"--author={author}")
    project.ok("export")
    before = project.patches()
    project.ok("check", "--upstream", "alpha")
    assert project.ok("status").code == 0 and project.ok("apply").out.count("up to date") == 2
    ((name, head),) = [(name, data) for name, data in before.items() if name.endswith(".patch")]
    assert b"From: M3PO overlay <overlay@m3po.invalid>\n" in head and author.encode() not in head
    assert re.fullmatch(r"alpha/0001-[a-z0-9-]{1,40}\.patch", name) and set(name[11:-6].split("-")) <= {
        *re.findall(r"[a-z0-9]+", subject.lower())
    }
    assert b"Patch-File" not in head and b"HOSTILE" not in head and b"\n-- \n" not in head
    project.ok("export", "--check")


def test_an_edit_committed_on_top_becomes_a_new_patch_and_leaves_the_others(project, one, crlf):
    project.series(("one.patch", one), ("dos.patch", crlf))
    project.ok("apply")
    before = project.patches()
    project.edit("src/alpha/dos.py", b"line_8 = 8\r\n", b"line_8 = 88\r\n")
    project.commit("dos: change Eight!")
    drift = project.run("export", "--check")
    assert drift.code == 1 and "new: patches/alpha/0003-dos-change-eight.patch" in drift.err
    assert project.patches() == before
    tree, stamps = project.tree(), project.stamps()
    assert "new: patches/alpha/0003-dos-change-eight.patch" in project.ok("export").out
    after = project.patches()
    assert {name: after[name] for name in before if name != "alpha/series"} == {
        name: data for name, data in before.items() if name != "alpha/series"
    }
    assert after["alpha/series"] == b"one.patch\ndos.patch\n0003-dos-change-eight.patch\n"
    assert b"+line_8 = 88\r\n" in after["alpha/0003-dos-change-eight.patch"]
    assert project.ok("apply").out.count("up to date") == 2 and (project.tree(), project.stamps()) == (tree, stamps)
    project.ok("check")


def test_amending_changes_only_that_patch_and_a_reworded_subject_keeps_the_file_name(project, one, crlf):
    project.series(("dos.patch", crlf), ("one.patch", one))
    project.ok("apply")
    project.edit("src/alpha/core.py", b"line_1 = 11", b"line_1 = 111")
    message = project.git("log", "-1", "--format=%B").replace("core: change a line", "core: say it better")
    project.git("commit", "-q", "-a", "--amend", "-m", message)
    project.ok("export")
    after = project.patches()
    assert set(after) == {"alpha/series", "alpha/dos.patch", "alpha/one.patch"} and after["alpha/dos.patch"] == crlf
    assert (
        b"+line_1 = 111\n" in after["alpha/one.patch"] and b"Subject: core: say it better" in after["alpha/one.patch"]
    )


def test_dropping_and_reordering_commits_rewrites_the_series_and_keeps_its_comment(project, one, crlf):
    project.series(("one.patch", one), ("dos.patch", crlf))
    series = project.root / "patches" / "alpha" / "series"
    series.write_bytes(b"# order matters\n" + series.read_bytes())
    project.ok("apply")
    first, second = project.git("rev-list", "--reverse", "refs/patchset/pristine..HEAD").split()
    project.git("reset", "-q", "--hard", "refs/patchset/pristine")
    project.git("-c", "commit.gpgSign=false", "cherry-pick", second, first)
    project.ok("export")
    assert series.read_bytes() == b"# order matters\ndos.patch\none.patch\n"
    project.git("reset", "-q", "--hard", "HEAD~1")
    assert "gone: patches/alpha/one.patch" in project.ok("export").out
    assert set(project.patches()) == {"alpha/series", "alpha/dos.patch"}
    project.ok("check")


def test_a_new_file_committed_in_vendor_moves_to_overlay(project, one):
    project.series(("one.patch", one))
    project.ok("apply")
    project.vendor("src/alpha/fresh.py").write_bytes(b"FRESH = 1\r\n")
    project.edit("src/alpha/core.py", b"line_6 = 6", b"import alpha.fresh")
    project.commit("core: call the new module")
    project.ok("export")
    file = project.root / "overlay" / "alpha" / "src" / "alpha" / "fresh.py"
    assert file.read_bytes() == b"FRESH = 1\r\n"
    assert project.vendor("src/alpha/fresh.py").resolve() == file.resolve()
    assert project.vendor("src/alpha/fresh.py").is_symlink()
    assert b"fresh.py" not in project.patches()["alpha/0002-core-call-the-new-module.patch"]
    assert project.git("status", "--porcelain") == "" and project.ok("status").code == 0
    project.ok("check")


def test_uncommitted_edits_are_refused_by_name_and_are_drift_for_check(project, one):
    project.series(("one.patch", one))
    project.ok("apply")
    before = project.patches()
    project.edit("src/alpha/core.py", b"line_5", b"LINE_5")
    result = project.run("export")
    assert result.code == 2 and "src/alpha/core.py" in result.err and "Commit them" in result.err
    assert project.run("export", "--check").code == 1
    project.commit("core: five")
    project.vendor("src/alpha/stray.py").write_text("x = 1\n")
    result = project.run("export")
    assert result.code == 2 and "src/alpha/stray.py" in result.err and project.patches() == before


def test_a_patch_edited_on_disk_is_not_overwritten(project, one):
    project.series(("one.patch", one))
    project.ok("apply")
    file = project.root / "patches" / "alpha" / "one.patch"
    file.write_bytes(one.replace(b"+line_1 = 11", b"+line_1 = 17"))
    result = project.run("export")
    assert result.code == 2 and "patches/alpha/one.patch changed after it was applied" in result.err
    assert b"line_1 = 17" in file.read_bytes()


def test_a_commit_without_a_complete_header_is_refused_before_anything_is_written(project):
    project.ok("apply")
    project.edit("src/alpha/core.py", b"line_5", b"LINE_5")
    project.git("commit", "-q", "-a", "-m", "quick fix")
    result = project.run("export")
    assert result.code == 2 and "patches/alpha/0001-quick-fix.patch: header without an Upstream-Status" in result.err
    assert project.patches() == {}


def test_two_commits_of_one_subject_are_two_patches_and_merges_are_refused(project):
    project.ok("apply")
    for old, new in ((b"line_5", b"LINE_5"), (b"LINE_5", b"LINE_FIVE")):
        project.edit("src/alpha/core.py", old, new)
        project.commit("core: five")
    project.ok("export")
    assert {"alpha/0001-core-five.patch", "alpha/0002-core-five.patch"} < set(project.patches())
    project.git("checkout", "-q", "-b", "side", "HEAD~1")
    project.edit("src/alpha/dos.py", b"line_5", b"LINE_5")
    project.commit("dos: five")
    project.git("merge", "-q", "--no-edit", "main")
    result = project.run("export")
    assert result.code == 2 and "merge commit" in result.err


def test_random_edits_survive_export_and_apply(project):
    chance = random.Random(7)
    project.ok("apply", "--upstream", "alpha")
    for round_ in range(4):
        for path in ("src/alpha/core.py", "src/alpha/dos.py", "src/alpha/mixed.py"):
            lines = project.vendor(path).read_bytes().splitlines(keepends=True)
            at = chance.randrange(len(lines))
            lines[at : at + chance.randrange(2)] = [
                b"v%d = '\xc3\xa4'%s" % (chance.randrange(99), chance.choice([b"\n", b"\r\n"]))
            ]
            project.vendor(path).write_bytes(b"".join(lines))
        project.commit(f"all: round {round_}")
    project.ok("export", "--upstream", "alpha")
    wanted = project.tree()
    subprocess.run(["rm", "-rf", project.root / "vendor"], check=True)
    project.ok("apply", "--upstream", "alpha")
    assert project.tree() == wanted
    project.ok("export", "--check", "--upstream", "alpha")
