# SPDX-License-Identifier: Apache-2.0
"""`bundle`: the diffs apply with plain git am, the wheels install with plain pip, both hold the tree of vendor/."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


@pytest.fixture
def bundled(project, one, crlf) -> Path:
    """The dist/ of a project with two patches (one to a CRLF file) and a new file in alpha, none in beta."""
    project.series(("one.patch", one), ("crlf.patch", crlf))
    fresh = project.root / "overlay" / "alpha" / "src" / "alpha" / "new.py"
    fresh.parent.mkdir(parents=True)
    fresh.write_text("X = 1\n")
    toml = project.root / "overlay.toml"
    toml.write_text("release = 3\n" + toml.read_text())
    project.ok("apply")
    out = project.ok("bundle").out
    assert "beta: nothing to bundle" in out and "dist/alpha-1.0+m3po.3.patch  " in out
    return project.root / "dist"


def patched_files(project) -> dict[str, bytes]:
    """The tree of vendor/, links followed."""
    return {path: data for path, data in project.tree().items() if "__pycache__" not in path}


def test_the_diff_applies_with_git_am_to_the_upstreams_git_and_gives_the_tree_of_vendor(project, bundled, tmp_path):
    """Its git has LF where the wheel has CRLF throughout; files with mixed ends are as in the wheel."""
    clone = tmp_path / "clone"
    git = ["git", "-C", str(clone), "-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.autocrlf=false"]
    git += ["-c", "commit.gpgSign=false", "-c", "am.threeWay=false", "-c", "core.attributesFile=/dev/null"]
    git += ["-c", "core.excludesFile=/dev/null"]
    subprocess.run(["git", "init", "-q", str(clone)], check=True)
    (clone / ".git" / "info" / "attributes").write_text("* -text\n")
    lf = {}
    for path, data in patched_files(project).items():
        lf[path] = data.replace(b"\r\n", b"\n") if data.count(b"\r\n") == data.count(b"\n") else data
    with zipfile.ZipFile(project.root / ".cache" / "wheels" / "alpha-1.0-py3-none-any.whl") as archive:
        for name in archive.namelist():
            data = archive.read(name)
            file = clone / "src" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data.replace(b"\r\n", b"\n") if data.count(b"\r\n") == data.count(b"\n") else data)
    subprocess.run([*git, "add", "-A", "-f"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "release 1.0"], check=True)
    diff = bundled / "alpha-1.0+m3po.3.patch"
    assert b"\r" not in diff.read_bytes()
    subprocess.run([*git, "am", "-q", str(diff)], check=True)
    made = {f.relative_to(clone).as_posix(): f for f in clone.rglob("*") if f.is_file() and ".git" not in f.parts}
    got = {path: file.read_bytes() for path, file in made.items()}
    assert got.keys() == lf.keys() and {path for path in got if got[path] != lf[path]} == set()


def test_the_wheel_holds_the_tree_of_vendor_apart_from_the_version(project, bundled):
    file = bundled / "alpha-1.0+m3po.3-py3-none-any.whl"
    with zipfile.ZipFile(file) as archive:
        inside = {name: archive.read(name) for name in archive.namelist()}
        modes = {info.filename: (info.external_attr >> 16) & 0o111 for info in archive.infolist()}
    info = "alpha-1.0+m3po.3.dist-info"
    assert b"Version: 1.0+m3po.3\n" in inside[f"{info}/METADATA"]
    wanted = {path.removeprefix("src/"): data for path, data in patched_files(project).items()}
    old = {name.replace("alpha-1.0.dist-info", info) for name in wanted}
    assert inside.keys() == old
    same = {name for name in wanted if "dist-info" not in name}
    assert {name for name in same if inside[name] != wanted[name]} == set()
    assert inside["alpha/new.py"] == b"X = 1\n" and b"line_1 = 11" in inside["alpha/core.py"]
    assert modes["alpha/run.sh"] and not modes["alpha/core.py"]


def test_the_wheel_installs_with_plain_pip_and_pip_check_and_record_agree(bundled, tmp_path):
    wheel, place = bundled / "alpha-1.0+m3po.3-py3-none-any.whl", tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", str(place), str(wheel)], check=True)
    code = "import alpha.new, importlib.metadata as m; print(alpha.new.X, m.version('alpha'))"
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(place)}, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "1.0+m3po.3"], done.stderr


def test_equal_inputs_give_equal_bytes(project, bundled):
    before = {file.name: file.read_bytes() for file in bundled.iterdir()}
    (bundled / "left over").write_text("of an older bundle")
    project.ok("bundle")
    assert {file.name: file.read_bytes() for file in bundled.iterdir()} == before


def test_requirements_among_the_bundled_are_pinned_to_the_local_version(project, bundled, tools):
    from patchset import bundle, pins

    up = next(up for up in pins.load(project.root) if up.name == "alpha")
    data = b"Name: alpha\nVersion: 1.0\nRequires-Dist: beta>=1\nRequires-Dist: beta-more\n"
    data += b'Requires-Dist: beta[x]; extra == "y"\n\nVersion: in the text\nRequires-Dist: beta\n'
    made = bundle.metadata(data, up, {"alpha": "1.0+m3po.3", "beta": "2.0+m3po.3"})
    assert made.split(b"\n\n")[0].splitlines() == [
        b"Name: alpha",
        b"Version: 1.0+m3po.3",
        b"Requires-Dist: beta==2.0+m3po.3",
        b"Requires-Dist: beta-more",
        b'Requires-Dist: beta[x]; extra == "y"',
    ]
    assert made.endswith(b"\n\nVersion: in the text\nRequires-Dist: beta\n")


@pytest.mark.parametrize("line", ["", "release = 0\n", 'release = "1"\n'])
def test_a_bundle_without_a_number_is_refused(project, bundled, line):
    toml = project.root / "overlay.toml"
    toml.write_text(line + toml.read_text().removeprefix("release = 3\n"))
    result = project.run("bundle")
    assert result.code == 2 and "release" in result.err and (bundled / "alpha-1.0+m3po.3.patch").exists()
