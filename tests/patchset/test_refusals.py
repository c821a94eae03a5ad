# SPDX-License-Identifier: Apache-2.0
"""What the tool refuses: work that would be lost, bytes that were changed, patches that do not apply, two at once."""

from __future__ import annotations

import fcntl
import os

import pytest

from patchset import common


@pytest.fixture
def applied(project, one, crlf):
    """A project with two patches and one new file, applied."""
    project.series(("one.patch", one), ("dos.patch", crlf))
    file = project.root / "overlay" / "alpha" / "src" / "alpha" / "more.py"
    file.parent.mkdir(parents=True)
    file.write_text("NEW = 3\n")
    project.ok("apply")
    return project


def tamper(project, what):
    """Change one thing; returns the path that must be named."""
    core, more = project.vendor("src/alpha/core.py"), project.vendor("src/alpha/more.py")
    if what == "byte":
        project.edit("src/alpha/core.py", b"line_7", b"lime_7")
    elif what == "byte behind size and mtime":
        times = core.stat()
        project.edit("src/alpha/core.py", b"line_7", b"lime_7")
        os.utime(core, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif what == "byte in a file no patch touches":
        project.edit("src/alpha/mixed.py", b"c = 3", b"c = 4")
        return "src/alpha/mixed.py"
    elif what == "byte in a file upstream ignores":
        project.edit("src/alpha/hidden/secret.log", b"shipped", b"SHIPPED")
        return "src/alpha/hidden/secret.log"
    elif what == "deleted":
        core.unlink()
    elif what == "mode":
        core.chmod(0o755)
    elif what == "file to link":
        core.unlink()
        core.symlink_to("dos.py")
    elif what == "stray":
        project.vendor("src/alpha/stray ünd.py").write_text("x = 1\n")
        return "src/alpha/stray ünd.py"
    elif what == "stray that upstream ignores":
        project.vendor("src/alpha/hidden/new.log").write_text("x")
        return "src/alpha/hidden/new.log"
    elif what == "link replaced":
        more.unlink()
        more.write_text("OTHER = 3\n")
        return "src/alpha/more.py"
    elif what == "link removed":
        more.unlink()
        return "src/alpha/more.py"
    elif what == "commit":
        project.edit("src/alpha/core.py", b"line_7", b"lime_7")
        project.commit("core: seven")
    return "src/alpha/core.py"


EDITS = ["byte", "byte behind size and mtime", "byte in a file no patch touches", "byte in a file upstream ignores"]
EDITS += ["deleted", "mode", "file to link", "stray", "stray that upstream ignores", "link replaced", "link removed"]
EDITS += ["commit"]


@pytest.mark.parametrize("what", EDITS)
def test_an_edit_in_vendor_is_named_by_status_and_refused_by_apply_until_discarded(applied, what):
    intended = applied.tree()
    path = tamper(applied, what)
    status = applied.run("status")
    assert status.code == 1 and "alpha 1.0: edited" in status.out and path in status.out
    edited = applied.tree()
    refused = applied.run("apply")
    assert refused.code == 2 and path in refused.err and "--discard" in refused.err and "export" in refused.err
    assert applied.tree() == edited
    discarded = applied.ok("apply", "--discard")
    ref = discarded.out.split("backup: ")[1].split()[0]
    assert applied.tree() == intended and applied.ok("status").code == 0
    applied.git("-c", "core.symlinks=true", "checkout", "-q", "-f", ref, "--", ".")
    restored = applied.vendor(path)
    if path in edited:
        assert restored.read_bytes() == edited[path]
    elif what == "deleted":
        assert path not in applied.git("ls-tree", "-r", "--name-only", ref)


def test_status_of_a_clean_checkout_names_nothing_even_after_pyc_files_came(applied):
    (applied.vendor("src/alpha/__pycache__")).mkdir()
    applied.vendor("src/alpha/__pycache__/core.cpython-311.pyc").write_bytes(b"x")
    assert applied.ok("status").out.count("\n") == 2


def test_a_half_done_rebase_is_refused_even_with_discard(applied):
    (applied.vendor(".git") / "rebase-merge").mkdir()
    for command in (["apply"], ["apply", "--discard"], ["export"]):
        result = applied.run(*command)
        assert result.code == 2 and "rebase-merge" in result.err


def test_a_nested_repository_is_never_dropped(applied):
    nested = applied.vendor("src/mine")
    nested.mkdir()
    applied.git("init", "-q", str(nested))
    (nested / "work.py").write_text("mine = 1\n")
    result = applied.run("apply", "--discard")
    assert result.code == 2 and "src/mine/ is a git repository of its own" in result.err
    assert (nested / "work.py").read_text() == "mine = 1\n"


def test_a_folder_the_tool_did_not_make_is_left_alone(project):
    project.vendor("notes.txt").parent.mkdir(parents=True)
    project.vendor("notes.txt").write_text("keep me")
    assert "vendor/alpha was not made by this tool" in project.run("status").out
    result = project.run("apply", "--discard")
    assert result.code == 2 and "vendor/alpha was not made by this tool" in result.err
    assert project.vendor("notes.txt").read_text() == "keep me"


@pytest.mark.parametrize("command", ["fetch", "apply", "check", "status"])
def test_one_byte_changed_in_a_wheel_is_named_and_the_file_is_not_replaced(applied, command):
    wheel = applied.root / ".cache" / "wheels" / "alpha-1.0-py3-none-any.whl"
    data = bytearray(wheel.read_bytes())
    data[len(data) // 2] ^= 1
    wheel.write_bytes(data)
    result = applied.run(command)
    assert result.code == (1 if command == "status" else 2)
    assert ".cache/wheels/alpha-1.0-py3-none-any.whl" in result.text and "delete the file" in result.text
    assert wheel.read_bytes() == data


def test_a_patch_that_no_longer_applies_is_a_conflict_and_vendor_stays(applied, one):
    before = applied.stamps()
    broken = one.replace(b" line_2 = 2", b" line_2 = 7").replace(b"+line_1 = 11", b"+line_1 = 12")
    (applied.root / "patches" / "alpha" / "one.patch").write_bytes(broken)
    result = applied.run("apply")
    assert result.code == 1
    for part in ("patches/alpha/one.patch does not apply", "src/alpha/core.py", "@@ -1,5 +1,5 @@", "  1. ", "  2. "):
        assert part in result.err
    assert applied.stamps() == before and applied.run("check").code == 1


def test_an_lf_patch_to_a_crlf_file_is_refused_with_that_reason(project, crlf):
    project.series(("dos.patch", crlf.replace(b"\r\n", b"\n")))
    result = project.run("apply")
    assert result.code == 1 and "src/alpha/dos.py has CRLF line ends, the patch has LF ones" in result.err


def test_the_projects_gitattributes_keep_the_bytes_of_patches_and_new_files(project, crlf):
    attributes = common.Path(__file__).parents[2] / ".gitattributes"
    repo, copy = project.root.parent / "kept", project.root.parent / "copy"
    (repo / "patches" / "alpha").mkdir(parents=True)
    (repo / "overlay").mkdir()
    (repo / ".gitattributes").write_bytes(attributes.read_bytes())
    (repo / "patches" / "alpha" / "dos.patch").write_bytes(crlf)
    (repo / "overlay" / "new.py").write_bytes(b"a = 1\r\n")
    applied = project.ok("fetch") and project
    user = ("-c", "core.autocrlf=true", "-c", "commit.gpgSign=false", "-C", str(repo))
    applied.git(*user, "init", "-q")
    applied.git(*user, "add", "-f", ".")
    applied.git(*user, "commit", "-q", "-m", "all")
    applied.git("-c", "core.autocrlf=true", "clone", "-q", str(repo), str(copy))
    assert (copy / "patches" / "alpha" / "dos.patch").read_bytes() == crlf
    assert (copy / "overlay" / "new.py").read_bytes() == b"a = 1\r\n"


def test_two_commands_at_once_the_second_gets_one_clear_line(applied):
    with (applied.root / ".cache" / "patchset.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(common.Refused, match="another patchset command is at work"), common.lock(applied.root, 0.1):
            pass
    applied.ok("status")


def test_usage_errors_leave_no_traceback(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (project.root / "overlay.toml").write_text("[upstream.alpha]\nversion = 3\n")
    assert "overlay.toml [upstream.alpha]: missing or unknown key" in project.run("status").err
    (project.root / "overlay.toml").write_text("[upstream.alpha\n")
    assert "overlay.toml cannot be read" in project.run("status").err
    (project.root / "overlay.toml").unlink()
    result = project.run("status")
    assert result.code == 2 and "has no overlay.toml" in result.err
