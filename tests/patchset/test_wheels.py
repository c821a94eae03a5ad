# SPDX-License-Identifier: Apache-2.0
"""Wheels: verified by hash and RECORD, unpacked only when every name is safe, downloaded only when absent."""

from __future__ import annotations

import os
import shutil
import zipfile

import pytest


def refused(project, reason):
    result = project.run("fetch", "--upstream", "alpha")
    assert result.code == 2 and reason in result.err, result.text
    assert not (project.root / "vendor" / "alpha").exists()
    assert not list(project.root.parent.rglob("evil*"))


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../evil.py", "'.' or '..' part"),
        ("alpha/../../../evil.py", "'.' or '..' part"),
        ("/evil.py", "absolute"),
        ("alpha\\..\\evil.py", "backslash"),
        ("alpha/.git/hooks/evil", "into .git"),
        ("alpha/e\nvil.py", "control character"),
        ("alpha-1.0.data/purelib/evil.py", ".data folder"),
    ],
)
def test_a_wheel_with_an_unsafe_name_is_refused(project, tools, path, reason):
    project.wheel("alpha", tools["ALPHA"] | {path: b"x = 1\n"}, prefix="src")
    refused(project, reason)


def rewrite(project, change):
    """Rebuild alpha's wheel through `change(name, data) -> [(ZipInfo, data)]`, keep RECORD, pin the new hash."""
    file = project.root / ".cache" / "wheels" / "alpha-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file) as archive:
        entries = [(info, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(file, "w") as archive:
        for info, data in (pair for entry in entries for pair in change(*entry)):
            archive.writestr(info, data)
    project.pin("alpha", file, "src")


def test_a_link_in_a_wheel_is_refused(project):
    def link(info, data):
        if info.filename == "alpha/core.py":
            info.external_attr = 0o120777 << 16
        return [(info, data)]

    rewrite(project, link)
    refused(project, "not a plain file")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda i, d: [(i, d + b"#" if i.filename == "alpha/core.py" else d)], "alpha/core.py in"),
        (lambda i, d: [] if i.filename == "alpha/core.py" else [(i, d)], "disagree about alpha/core.py"),
        (
            lambda i, d: [(i, d), ("alpha/evil.py", d)] if i.filename == "alpha/core.py" else [(i, d)],
            "about alpha/evil",
        ),
        (lambda i, d: [] if i.filename.endswith("RECORD") else [(i, d)], "no RECORD"),
    ],
    ids=["changed", "missing", "extra", "no record"],
)
def test_a_wheel_that_disagrees_with_its_record_is_refused(project, change, reason):
    rewrite(project, change)
    refused(project, reason)


def test_a_name_twice_in_a_wheel_is_refused(project):
    with pytest.warns(UserWarning, match="Duplicate"):
        rewrite(project, lambda i, d: [(i, d), (i.filename, d)] if i.filename == "alpha/core.py" else [(i, d)])
    refused(project, "holds a name twice")


def test_without_the_wheel_and_without_a_network_the_line_says_what_to_do(project):
    (project.root / ".cache" / "wheels" / "alpha-1.0-py3-none-any.whl").unlink()
    refused(project, "could not download alpha==1.0")
    assert "put the wheel into .cache/wheels" in project.run("fetch").err


def test_a_missing_wheel_is_taken_from_pips_index_by_hash_and_a_wrong_one_is_not(project, tmp_path, monkeypatch):
    wheels, offer = project.root / ".cache" / "wheels", tmp_path / "offer"
    shutil.move(wheels, offer)
    monkeypatch.setenv("PIP_FIND_LINKS", offer.as_uri())
    project.ok("fetch", "--upstream", "alpha")
    assert os.listdir(wheels) == ["alpha-1.0-py3-none-any.whl"]
    with zipfile.ZipFile(offer / "beta-1.0-py3-none-any.whl", "a") as archive:
        archive.writestr("beta/evil.py", "x = 1\n")
    result = project.run("fetch", "--upstream", "beta")
    assert result.code == 2 and "could not download beta" in result.err
    assert os.listdir(wheels) == ["alpha-1.0-py3-none-any.whl"] and not (project.root / "vendor" / "beta").exists()


def test_applied_checkouts_need_neither_wheel_nor_network(project, one):
    project.series(("one.patch", one))
    project.ok("apply")
    shutil.rmtree(project.root / ".cache" / "wheels")
    project.series(("one.patch", one.replace(b"+line_1 = 11", b"+line_1 = 12")))
    project.ok("apply")
    assert b"line_1 = 12\n" in project.vendor("src/alpha/core.py").read_bytes()
