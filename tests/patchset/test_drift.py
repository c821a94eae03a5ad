# SPDX-License-Identifier: Apache-2.0
"""`check --against` and `upgrade`: the series on another release, on small made-up upstreams."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from patchset import cli, git

FIRST = b"line_1 = 1\n"


def release(project, tools, files: dict[str, bytes], version: str = "2.0") -> None:
    """Put a wheel of another release into the cache; 1.0 stays pinned."""
    pinned = project.root / ".cache" / "wheels" / "alpha-1.0-py3-none-any.whl"
    project.wheel("alpha", tools["ALPHA"] | files, prefix="src", version=version)
    project.pin("alpha", pinned, "src")


def everything(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ["1 clean", "clean     one.patch"]),
        ({"alpha/core.py": "away"}, ["1 moved", "by 5 lines"]),
        ({"alpha/core.py": "near"}, ["1 moved", "three-way merge"]),
        ({"alpha/core.py": "there"}, ["1 upstream"]),
    ],
)
def test_a_patch_is_told_apart_as_clean_moved_or_upstream(project, tools, change, words):
    ten = tools["TEN"]
    new = ten.replace(b"line_4 = 4\n", b"line_4 = 44\n")
    contents = {
        "away": b"# new head\n" * 5 + ten,
        "near": ten.replace(b"line_1 = 1\n", b"line_1 = 11\n"),  # in the context, so that only a merge can do it
        "there": new,
    }
    project.series(("one.patch", tools["mail"](tools["diff"]("src/alpha/core.py", ten, new))))
    release(project, tools, {path: contents[name] for path, name in change.items()})
    result = project.ok("check", "--upstream", "alpha", "--against", "2.0")
    assert result.out.startswith("alpha 1.0 against 2.0: ")
    assert all(word in result.out for word in [*words, "imports   ok"]), result.text


def test_latest_is_the_newest_release_of_the_index(project, tools, one, monkeypatch, capsys):
    """The index is a stand-in: made-up upstreams are on none."""
    project.series(("one.patch", one))
    release(project, tools, {})
    monkeypatch.setattr("patchset.wheels.newest", lambda up, count: ["2.0"][:count])
    assert cli.main(["check", "--root", str(project.root), "--upstream", "alpha", "--against", "latest"]) == 0
    assert capsys.readouterr().out.startswith("alpha 1.0 against 2.0: 1 clean")


def test_a_planted_conflict_is_named_and_leaves_everything_untouched(project, tools, one, crlf):
    project.series(("one.patch", one), ("crlf.patch", crlf))
    project.ok("apply")
    release(project, tools, {"alpha/core.py": tools["TEN"].replace(FIRST, b"line_1 = 100\n")})
    before = everything(project.root)
    result = project.run("check", "--upstream", "alpha", "--against", "2.0")
    assert result.code == 1
    assert "conflict  one.patch (src/alpha/core.py)" in result.err and "clean     crlf.patch" in result.err
    assert "imports   not tried" in result.err
    after = everything(project.root)
    assert {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)} == set()


def test_a_file_that_is_gone_and_a_path_that_is_taken_are_conflicts(project, tools, one):
    project.series(("one.patch", one))
    fresh = project.root / "overlay" / "alpha" / "src" / "alpha" / "new.py"
    fresh.parent.mkdir(parents=True)
    fresh.write_text("X = 1\n")
    release(project, tools, {"alpha/new.py": b"Y = 2\n"})
    result = project.run("check", "--upstream", "alpha", "--against", "2.0")
    assert result.code == 1 and "conflict  src/alpha/new.py (the release has that path)" in result.err
    del tools["ALPHA"]["alpha/core.py"]
    try:
        release(project, tools, {}, "3.0")
    finally:
        tools["ALPHA"]["alpha/core.py"] = tools["TEN"]
    result = project.run("check", "--upstream", "alpha", "--against", "3.0")
    assert result.code == 1 and "conflict  one.patch (src/alpha/core.py is gone" in result.err


def test_a_requirement_that_the_environment_lacks_is_named(project, tools, one):
    project.series(("one.patch", one))
    release(project, tools, {"alpha/__init__.py": b"import no_such_package_here\n"})
    result = project.ok("check", "--upstream", "alpha", "--against", "2.0")
    assert "imports   ModuleNotFoundError: No module named 'no_such_package_here'" in result.out


def test_a_release_needs_its_upstream_and_a_version_that_exists(project, one):
    project.series(("one.patch", one))
    assert project.run("check", "--against", "2.0").code == 2
    result = project.run("check", "--upstream", "alpha", "--against", "9.9")
    assert result.code == 2 and "could not download alpha==9.9" in result.err
    assert project.run("check", "--upstream", "alpha", "--against", "../x").code == 2


def pin(project) -> str:
    text = (project.root / "overlay.toml").read_text()
    return text.split('version = "')[1].split('"')[0]


def test_an_upgrade_moves_the_pin_and_rewrites_only_the_patches_that_moved(project, tools, one, crlf):
    project.series(("one.patch", one), ("crlf.patch", crlf))
    project.ok("apply")
    project.ok("export")
    before = project.patches()
    dos = b"# head\r\n" * 5 + tools["ALPHA"]["alpha/dos.py"]
    release(project, tools, {"alpha/dos.py": dos, "alpha/__init__.py": b"VALUE = 9\n"})
    beta = (project.root / "overlay.toml").read_text().split("[upstream.beta]")[1]
    result = project.ok("upgrade", "--upstream", "alpha", "--version", "2.0")
    assert "alpha: 1.0 -> 2.0" in result.out and pin(project) == "2.0"
    assert (project.root / "overlay.toml").read_text().split("[upstream.beta]")[1] == beta
    changed = {name for name, data in project.patches().items() if before.get(name) != data}
    assert changed == {"alpha/crlf.patch"} and before.keys() == project.patches().keys()
    assert b"line_1 = 11\n" in project.vendor("src/alpha/core.py").read_bytes()
    assert project.vendor("src/alpha/__init__.py").read_bytes() == b"VALUE = 9\n"
    assert "alpha 2.0: patched" in project.ok("status").out
    project.ok("check")
    stamps = project.stamps()
    assert "up to date" in project.ok("apply").out and project.stamps() == stamps


def test_an_upgrade_drops_what_the_release_has(project, tools, one, crlf):
    project.series(("one.patch", one), ("crlf.patch", crlf))
    project.ok("apply")
    release(project, tools, {"alpha/core.py": tools["TEN"].replace(FIRST, b"line_1 = 11\n")})
    project.ok("upgrade", "--upstream", "alpha", "--version", "2.0")
    assert set(project.patches()) == {"alpha/crlf.patch", "alpha/series"}
    project.ok("check")


@pytest.fixture
def stopped(project, tools, one, two, crlf):
    """A project inside an upgrade whose first patch conflicts; what was printed."""
    project.series(("one.patch", one), ("crlf.patch", crlf))
    project.ok("apply")
    release(project, tools, {"alpha/core.py": tools["TEN"].replace(FIRST, b"line_1 = 100\n")})
    result = project.run("upgrade", "--upstream", "alpha", "--version", "2.0")
    assert result.code == 1, result.text
    return result.err


def test_a_conflict_stops_the_upgrade_with_the_next_steps_and_plain_git_goes_on(project, stopped):
    assert "the patch 'core: change a line' does not fit 2.0" in stopped
    assert all(f"  {n}. " in stopped for n in (1, 2, 3, 4)) and "make export-patches" in stopped
    assert "edited" in project.run("status").out and project.run("apply").code == 2
    file = project.vendor("src/alpha/core.py")
    assert b"<<<<<<<" in file.read_bytes()
    file.write_bytes(file.read_bytes().split(b"<<<<<<<")[0] + b"line_1 = 111\n" + file.read_bytes().split(b"\n")[-1])
    project.git("add", "src/alpha/core.py")
    project.git("-c", "core.editor=true", "rebase", "--continue")
    project.ok("export")
    assert pin(project) == "2.0" and b"+line_1 = 111" in project.patches()["alpha/one.patch"]
    assert "alpha 2.0: patched" in project.ok("status").out


def test_an_upgrade_can_be_given_up(project, stopped, one):
    before = project.patches()
    project.git("rebase", "--abort")
    text = (project.root / "overlay.toml").read_text()
    assert 'version = "2.0"' in text
    project.pin("alpha", project.root / ".cache" / "wheels" / "alpha-1.0-py3-none-any.whl", "src")
    project.ok("apply", "--discard")
    assert project.patches() == before and "alpha 1.0: patched" in project.ok("status").out
    assert b"line_1 = 11\n" in project.vendor("src/alpha/core.py").read_bytes()


def test_an_upgrade_is_refused_while_the_checkout_has_edits(project, tools, one):
    project.series(("one.patch", one))
    project.ok("apply")
    release(project, tools, {})
    project.edit("src/alpha/core.py", b"line_9 = 9", b"line_9 = 99")
    before = everything(project.root / "vendor"), (project.root / "overlay.toml").read_text()
    assert project.run("upgrade", "--upstream", "alpha", "--version", "2.0").code == 2
    assert before[1] == (project.root / "overlay.toml").read_text()
    assert project.run("upgrade", "--upstream", "alpha", "--version", "1.0").code == 2


def test_an_upgrade_is_refused_while_the_pin_is_not_committed(project, tools, one):
    project.series(("one.patch", one))
    project.ok("apply")
    release(project, tools, {})
    subprocess.run(["git", "init", "-q", str(project.root)], check=True, env=git.environment())
    repo = git.Git(project.root / ".git", project.root)
    repo("add", "patches")
    result = project.run("upgrade", "--upstream", "alpha", "--version", "2.0")
    assert result.code == 2 and "overlay.toml or patches/alpha is not committed" in result.err
    repo("add", "overlay.toml")
    repo("commit", "-q", "-m", "pin")
    project.ok("upgrade", "--upstream", "alpha", "--version", "2.0")


def test_an_upgrade_to_a_release_that_has_one_of_our_paths_is_refused(project, tools, one):
    project.series(("one.patch", one))
    fresh = project.root / "overlay" / "alpha" / "src" / "alpha" / "new.py"
    fresh.parent.mkdir(parents=True)
    fresh.write_text("X = 1\n")
    project.ok("apply")
    release(project, tools, {"alpha/new.py": b"Y = 2\n"})
    result = project.run("upgrade", "--upstream", "alpha", "--version", "2.0")
    assert result.code == 2 and "upstream 2.0 has that path" in result.err and pin(project) == "1.0"
    assert "alpha 1.0: patched" in project.ok("status").out
