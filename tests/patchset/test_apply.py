# SPDX-License-Identifier: Apache-2.0
"""apply: what the checkout holds afterwards, and that nothing moves when nothing changed."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess

import pytest


def test_pristine_tree_holds_every_byte_of_the_wheel_whatever_ignore_and_attribute_files_it_ships(project, tools):
    project.ok("fetch")
    shipped = {f"src/{path}": data for path, data in tools["ALPHA"].items()}
    tree = project.tree()
    assert {path: tree[path] for path in shipped} == shipped
    assert set(tree) - set(shipped) == {f"src/alpha-1.0.dist-info/{n}" for n in ("METADATA", "RECORD", "WHEEL")}
    assert project.vendor("src/alpha/run.sh").stat().st_mode & stat.S_IXUSR
    assert not project.vendor("src/alpha/core.py").stat().st_mode & stat.S_IXUSR


def test_fetch_then_status_says_pristine_and_apply_says_patched(project, one):
    project.series(("one.patch", one))
    project.ok("fetch")
    status = project.run("status")
    assert status.code == 1 and "alpha 1.0: pristine" in status.out and "beta 1.0: pristine" in status.out
    project.ok("apply")
    assert "alpha 1.0: patched (1 patches" in project.ok("status").out


def test_apply_changes_files_inside_an_ignored_folder_of_another_repository(project, one, crlf):
    project.series(("one.patch", one), ("dos.patch", crlf))
    project.ok("apply")
    assert b"line_1 = 11\n" in project.vendor("src/alpha/core.py").read_bytes()
    dos = project.vendor("src/alpha/dos.py").read_bytes()
    assert b"line_3 = 33\r\n" in dos and dos.count(b"\r\n") == dos.count(b"\n") == 10


def test_apply_ignores_inherited_git_variables(project, one, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    subprocess.run(["git", "init", "-q", str(elsewhere)], check=True)
    monkeypatch.setenv("GIT_DIR", str(elsewhere / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(elsewhere / "index"))
    monkeypatch.setenv("GIT_WORK_TREE", str(elsewhere))
    project.series(("one.patch", one))
    project.ok("apply")
    project.ok("export", "--check")
    assert b"line_1 = 11\n" in project.vendor("src/alpha/core.py").read_bytes()
    assert os.listdir(elsewhere) == [".git"]


def test_second_apply_touches_no_file_and_says_so(project, one, two, crlf):
    project.series(("one.patch", one), ("two.patch", two), ("dos.patch", crlf))
    new_file(project)
    project.ok("apply")
    before = project.stamps() | project.stamps("beta")
    again = project.ok("apply")
    assert again.out.count("up to date") == 2
    assert project.stamps() | project.stamps("beta") == before


def test_two_projects_get_equal_commit_ids(project, one, tmp_path):
    project.series(("one.patch", one))
    project.ok("apply")
    copy = tmp_path / "copy"
    shutil.copytree(project.root, copy, ignore=shutil.ignore_patterns("vendor"))
    first, project.root = project.git("rev-parse", "HEAD"), copy
    project.ok("apply")
    assert project.git("rev-parse", "HEAD") == first


def test_stock_git_am_gives_the_same_tree(project, one, two, crlf, tmp_path):
    project.series(("one.patch", one), ("two.patch", two), ("dos.patch", crlf))
    project.ok("apply")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", project.root / "vendor" / "alpha", clone], check=True)
    git = ["git", "-C", str(clone), "-c", "core.autocrlf=false", "-c", "user.name=x", "-c", "user.email=y@z"]
    git += ["-c", "commit.gpgSign=false", "-c", "apply.whitespace=nowarn", "-c", "am.threeWay=false"]
    (clone / ".git" / "info" / "attributes").write_text("* -text !eol -ident\n")
    pristine = project.git("rev-parse", "refs/patchset/pristine")
    subprocess.run([*git, "checkout", "-q", "-f", pristine], check=True)
    folder = project.root / "patches" / "alpha"
    files = [str(folder / name) for name in (folder / "series").read_text().split()]
    subprocess.run([*git, "am", "-q", "--keep-cr", *files], check=True, capture_output=True)
    tree = subprocess.run([*git, "rev-parse", "HEAD^{tree}"], check=True, capture_output=True, text=True).stdout.strip()
    assert tree == project.git("rev-parse", "HEAD^{tree}")


def test_a_changed_patch_is_named_by_status_and_laid_on_by_apply(project, one, crlf):
    project.series(("one.patch", one), ("dos.patch", crlf))
    project.ok("apply")
    file = project.root / "patches" / "alpha" / "one.patch"
    file.write_bytes(one.replace(b"+line_1 = 11", b"+line_1 = 99"))
    status = project.run("status")
    assert status.code == 1 and "alpha 1.0: stale" in status.out
    assert "patches/alpha/one.patch changed" in status.out and "dos.patch" not in status.out
    project.ok("apply")
    assert b"line_1 = 99\n" in project.vendor("src/alpha/core.py").read_bytes()
    assert project.ok("status").code == 0


def test_dropping_adding_and_reordering_patches_is_noticed(project, one, crlf):
    project.series(("one.patch", one), ("dos.patch", crlf))
    project.ok("apply")
    project.series(("dos.patch", crlf), ("one.patch", one))
    assert "patches/alpha/series: another order" in project.run("status").out
    project.series(("dos.patch", crlf))
    assert "patches/alpha/one.patch removed" in project.run("status").out
    project.ok("apply")
    assert project.vendor("src/alpha/core.py").read_bytes() == b"".join(b"line_%d = %d\n" % (n, n) for n in range(10))


def test_a_changed_pin_is_named_and_apply_takes_the_new_wheel(project, tools, one):
    project.series(("one.patch", one))
    project.ok("apply")
    project.wheel("alpha", tools["ALPHA"] | {"alpha/later.py": b"x = 1\n"}, prefix="src", version="1.1")
    assert "overlay.toml: version 1.0 -> 1.1" in project.run("status").out
    assert "until apply" in project.ok("fetch").out
    project.ok("apply")
    assert project.vendor("src/alpha/later.py").exists() and project.ok("status").code == 0
    assert project.vendor("src/alpha-1.1.dist-info").is_dir() and not project.vendor("src/alpha-1.0.dist-info").exists()


def new_file(project, path="src/alpha/extra/more.py", text="NEW = 3\n"):
    file = project.root / "overlay" / "alpha" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def test_new_files_are_linked_relatively_and_follow_the_overlay_folder(project, tmp_path):
    file = new_file(project)
    project.ok("apply")
    link = project.vendor("src/alpha/extra/more.py")
    assert link.is_symlink() and not os.path.isabs(os.readlink(link)) and link.resolve() == file.resolve()
    assert project.git("status", "--porcelain") == ""
    before = project.stamps()
    second = new_file(project, "src/alpha/other.py")
    file.unlink()
    status = project.run("status")
    assert "overlay/alpha/src/alpha/extra/more.py removed" in status.out and "other.py added" in status.out
    (link.parent / "__pycache__").mkdir()
    (link.parent / "__pycache__" / "more.cpython-311.pyc").write_bytes(b"old")
    project.ok("apply")
    assert not link.parent.exists() and project.vendor("src/alpha/other.py").resolve() == second.resolve()
    rest = {path: stamp for path, stamp in project.stamps().items() if path in before}
    assert rest == {path: stamp for path, stamp in before.items() if "more.py" not in path}


def test_the_project_can_be_moved_and_is_still_up_to_date(project, one):
    project.series(("one.patch", one))
    new_file(project)
    project.ok("apply")
    project.root = project.root.rename(project.root.with_name("moved"))
    assert project.vendor("src/alpha/extra/more.py").read_bytes() == b"NEW = 3\n"
    assert project.ok("apply").out.count("up to date") == 2


def test_changing_a_new_file_makes_status_stale_and_apply_only_records_it(project):
    file = new_file(project)
    project.ok("apply")
    before = project.stamps()
    file.write_text("NEW = 4\n")
    assert "overlay/alpha/src/alpha/extra/more.py changed" in project.run("status").out
    project.ok("apply")
    assert project.ok("status").code == 0 and project.stamps() == before


@pytest.mark.parametrize("path", ["src/alpha/core.py", "src/alpha", "src/alpha/core.py/inside.py"])
def test_a_new_file_where_upstream_has_a_path_is_refused(project, path):
    new_file(project, path)
    result = project.run("apply")
    assert result.code == 2 and f"overlay/alpha/{path}: upstream 1.0 has that path" in result.err
    assert not (project.root / "vendor" / "alpha").exists()


def test_status_as_json_gives_state_edits_and_reasons_per_upstream(project, one):
    project.series(("one.patch", one))
    assert json.loads(project.run("status", "--json").out)["alpha"]["state"] == "missing"
    project.ok("apply")
    project.edit("src/alpha/core.py", b"line_9", b"LINE_9")
    (project.root / "patches" / "alpha" / "one.patch").write_bytes(one.replace(b"= 11", b"= 13"))
    found = json.loads(project.run("status", "--json").out)
    assert found["alpha"]["state"] == "edited" and found["alpha"]["edited"] == {"src/alpha/core.py": "M"}
    assert found["alpha"]["stale"] == ["patches/alpha/one.patch changed"]
    assert found["beta"]["state"] == "patched"


def test_only_the_named_upstream_is_touched(project):
    project.ok("apply", "--upstream", "beta")
    assert (project.root / "vendor" / "beta").is_dir() and not (project.root / "vendor" / "alpha").exists()
    wrong = project.run("apply", "--upstream", "gamma")
    assert wrong.code == 2 and "--upstream gamma: not in overlay.toml (it has alpha, beta)" in wrong.err
