# SPDX-License-Identifier: Apache-2.0
"""Hostile and careless patches are refused, by apply and by check, before anything is written."""

from __future__ import annotations

import base64

import pytest

HEAD = b"diff --git a/%s b/%s\n"
HUNK = b"@@ -1 +1 @@\n-a\n+b\n"


def change(path, extra=b"index 1111111..2222222 100644\n", old=None, new=None):
    path = path.encode()
    names = b"--- %s\n+++ %s\n" % (old or b"a/" + path, new or b"b/" + path)
    return HEAD % (path, path) + extra + names + HUNK


NEW = "src/alpha/core.py"
HOSTILE = {
    "dot-dot": (change("src/alpha/../../x.py"), "'.' or '..' part"),
    "absolute": (change("/etc/passwd"), "absolute"),
    "into .git": (change("src/alpha/.git/hooks/pre-commit"), "into .git"),
    "into .GIT": (change("src/alpha/.GIT/config"), "into .git"),
    "backslash": (change("src/alpha\\x.py"), "backslash"),
    "control character": (change("src/alpha/x\x01.py"), "control character"),
    "outside": (change("src/other/x.py"), "outside what overlay.toml allows"),
    "metadata": (change("src/alpha-1.0.dist-info/METADATA"), "outside what overlay.toml allows"),
    "other target": (change(NEW, new=b"b/src/alpha/else.py"), "not a header line"),
    "quoted": (HEAD % (b'"src/alpha/a.py"', b'"src/alpha/a.py"') + HUNK, "not plain ASCII|quoted|allows|header"),
    "rename": (HEAD % (NEW.encode(), b"src/alpha/c.py") + b"similarity index 100%\n", "rename"),
    "rename, equal names": (change(NEW, b"rename from src/alpha/core.py\n"), "rename"),
    "symlink": (change(NEW, b"new file mode 120000\nindex 0000000..1111111\n", b"/dev/null"), "new file"),
    "to symlink": (change(NEW, b"old mode 100644\nnew mode 120000\n"), "mode 120000"),
    "submodule": (change(NEW, b"index 1111111..2222222 160000\n"), "mode 160000"),
    "setuid": (change(NEW, b"old mode 100644\nnew mode 104755\n"), "mode 104755"),
    "new file": (change(NEW, b"new file mode 100644\n", b"/dev/null"), "belongs in overlay/"),
    "binary": (HEAD % ((NEW.encode(),) * 2) + b"GIT binary patch\nliteral 1\nIc$}\n", "binary"),
    "binary files": (HEAD % ((NEW.encode(),) * 2) + b"Binary files a/x and b/x differ\n", "binary"),
    "NUL": (change(NEW).replace(b"+b", b"+\0"), "binary"),
    "whitespace": (change(NEW).replace(b"+b", b"+  a "), "only whitespace"),
    "blank lines": (change(NEW).replace(b"@@ -1 +1 @@\n-a\n+b\n", b"@@ -1 +1,3 @@\n a\n+\n+\n"), "only whitespace"),
    "mode only": (HEAD % ((NEW.encode(),) * 2) + b"old mode 100644\nnew mode 100755\n", "bare change of mode"),
    "no change": (b"nothing here\n", "no change|no part"),
    "cut off": (change(NEW).replace(b"@@ -1 +1 @@", b"@@ -1,5 +1,5 @@"), "cut off"),
    "twice": (change(NEW) * 2, "listed twice"),
    "noise": (change(NEW) + b"--- a/../../x\n+++ b/../../x\n" + HUNK, "no part|header line|malformed"),
    "plain diff": (b"--- a/../../x\n+++ b/../../x\n" + HUNK + change(NEW), "no part"),
    "no newline": (change(NEW)[:-1], "newline"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_patch_is_refused_for_what_it_changes(project, tools, what):
    diff, reason = HOSTILE[what]
    project.series(("bad.patch", tools["mail"](diff)))
    for command in ("apply", "check"):
        result = project.run(command)
        assert result.code == 2 and "patches/alpha/bad.patch: " in result.err, result.text
        assert any(part in result.err for part in reason.split("|")), result.err
    assert not (project.root / "vendor").exists()


def test_lint_reads_what_git_decodes_so_an_encoded_body_hides_nothing(project, tools):
    hidden = base64.encodebytes(change("src/alpha/../../x.py"))
    data = tools["mail"](b"").split(b"\n\n")[0] + b"\nContent-Transfer-Encoding: base64\n\n" + hidden
    project.series(("bad.patch", data))
    result = project.run("apply")
    assert result.code == 2 and "'..' part" in result.err


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("Why this is needed, and why no milder rung served.\n", "", "without a body that says why"),
        ("Upstream-Status: Pending\n", "", "without an Upstream-Status"),
        ("Upstream-Status: Pending\n", "Upstream-Status:\n", "without an Upstream-Status"),
        ("Tests: tests/test_it.py\n", "", "without a Tests:"),
        (
            "tests/test_it.py",
            "tests/test_it.py::test_it, tests/test_gone.py",
            "Tests: tests/test_gone.py does not exist",
        ),
        ("{subject}", "", "without Subject"),
        ("Tests:", "Patch-File: x.patch\nTests:", "Patch-File"),
    ],
)
def test_a_patch_is_refused_for_its_header(project, tools, one, old, new, reason):
    header = tools["HEADER"].replace(old, new)
    project.series(("bad.patch", tools["mail"](one[one.index(b"diff --git") :], header=header)))
    result = project.run("apply")
    assert result.code == 2 and "patches/alpha/bad.patch" in result.err and reason in result.err


def test_every_patch_at_fault_is_named_at_once(project, tools, one):
    bad = tools["mail"](change("src/other/x.py"))
    project.series(("a.patch", bad), ("b.patch", one), ("c.patch", bad))
    result = project.run("check")
    assert "a.patch" in result.err and "c.patch" in result.err and "b.patch" not in result.err


@pytest.mark.parametrize(
    ("series", "reason"),
    [
        ("one.patch\none.patch\n", "listed twice"),
        ("one.patch\ngone.patch\n", "gone.patch is not a file"),
        ("", "patches/alpha/one.patch is not in patches/alpha/series"),
        ("../one.patch\n", "not the plain name"),
    ],
)
def test_series_and_files_must_agree(project, one, series, reason):
    project.series(("one.patch", one))
    (project.root / "patches" / "alpha" / "series").write_text(series)
    for command in ("apply", "check"):
        result = project.run(command)
        assert result.code == 2 and reason in result.err
    assert not (project.root / "vendor").exists()


def test_a_diffstat_and_a_mailers_signature_are_tolerated_by_apply_and_named_by_check(project, one):
    cut = one.index(b"diff --git")
    plain = one[:cut].rstrip(b"\n") + b"\n---\n core.py | 2 +-\n 1 file changed\n\n" + one[cut:] + b"-- \n2.39.5\n\n"
    project.series(("one.patch", plain))
    project.ok("apply")
    result = project.run("check")
    assert result.code == 1 and "does not round-trip" in result.err and "one.patch" in result.err
