# SPDX-License-Identifier: Apache-2.0
"""The local versions of the bundle (`5.17.0+m3po.1`) change no answer of the pinned Unsloth's version checks.

Read from Unsloth's own metadata and source in `vendor/`: importing Unsloth takes a GPU.
"""

from __future__ import annotations

import ast
import importlib.metadata
import operator
import re
from collections.abc import Callable, Iterator
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from patchset import pins

ROOT = Path(__file__).resolve().parents[2]
UNSLOTH = [ROOT / "vendor/unsloth", ROOT / "vendor/unsloth_zoo"]
PINNED = {up.name: up.version for up in pins.load(ROOT) if up.name in {"transformers", "trl"}}
LOCAL = {name: f"{version}+m3po.{pins.release_number(ROOT)}" for name, version in PINNED.items()}
COMPARE: dict[type, Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


def unsloths_version() -> Callable[[str], Version]:
    """Unsloth's `Version(text)`, which makes `5.17.0.1` of a local version."""
    tree = ast.parse((UNSLOTH[1] / "unsloth_zoo/utils.py").read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "Version"]
    scope: dict[str, Any] = {
        "re": re,
        "TrueVersion": Version,
        "importlib_version": importlib.metadata.version,
        "PackageNotFoundError": importlib.metadata.PackageNotFoundError,
    }
    exec(compile(tree, "unsloth_zoo/utils.py", "exec"), scope)
    return scope["Version"]


def literal(node: ast.expr) -> str | None:
    """The text of `Version("...")`, `TrueVersion("...")`."""
    match node:
        case ast.Call(func=ast.Name(id=name), args=[ast.Constant(value=str(text))]) if name.endswith("Version"):
            return text if text[:1].isdigit() else None
    return None


def comparisons() -> Iterator[tuple[str, type, str]]:
    """(file and line, operator with the installed version on its left, the literal) of every check in Unsloth."""
    mirrored = {ast.Lt: ast.Gt, ast.LtE: ast.GtE, ast.Gt: ast.Lt, ast.GtE: ast.LtE}
    for path in (path for folder in UNSLOTH for path in sorted(folder.rglob("*.py"))):
        source = path.read_bytes()
        for node in ast.walk(ast.parse(source)) if b"Version(" in source else ():
            if not isinstance(node, ast.Compare):
                continue
            for left, op, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
                where = f"{path.relative_to(ROOT)}:{node.lineno}"
                if (text := literal(right)) is not None:
                    yield where, type(op), text
                elif (text := literal(left)) is not None:
                    yield where, mirrored.get(type(op), type(op)), text


def test_unsloths_checks_answer_alike_for_the_local_version() -> None:
    version = unsloths_version()
    checks = list(comparisons())
    assert len(checks) > 50, "Unsloth's checks were not found"
    for name in PINNED:
        plain, local = version(PINNED[name]), version(LOCAL[name])
        assert plain != local  # so that a check on the pin itself could tell them apart
        differ = [
            f"{where}: {op.__name__} {text}"
            for where, op, text in checks
            if COMPARE[op](plain, Version(text)) != COMPARE[op](local, Version(text))
        ]
        assert differ == [], name


@pytest.mark.parametrize("name", PINNED)
def test_unsloths_requirements_admit_the_local_version(name: str) -> None:
    found = []
    for folder in UNSLOTH:
        (file,) = folder.glob("*.dist-info/METADATA")
        lines = HeaderParser().parsestr(file.read_text(encoding="utf-8")).get_all("Requires-Dist")
        found += [wanted for wanted in map(Requirement, lines or []) if wanted.name == name]
    assert found
    for wanted in found:
        assert wanted.specifier.contains(LOCAL[name]), str(wanted)
