# SPDX-License-Identifier: Apache-2.0
"""Imports point one way, and importing our code does nothing: read from the source, not run."""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TREES = {"overlay": ROOT / "overlay", "patchset": ROOT / "scripts/patchset", "m3po_lab": ROOT / "scripts/m3po_lab"}
MODULES = [(tree, path) for tree, folder in TREES.items() for path in sorted(folder.rglob("*.py"))]
OVERLAYS = [ROOT / "overlay" / name for name in ("transformers/src", "trl", "unsloth", "vllm")]
SOURCES = [*OVERLAYS, ROOT / "scripts"]
LOOKUPS = {"getattr", "setattr", "hasattr", "delattr"}


def imported(tree: ast.AST) -> set[str]:
    """The top-level packages that a module imports anywhere in its text; relative imports stay in their package."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return {name.split(".")[0] for name in names}


def private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def private_names_used(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of every underscore name that is imported, read as an attribute, or looked up by string."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in LOOKUPS:
            names = [argument.value for argument in node.args[1:2] if isinstance(argument, ast.Constant)]
        yield from ((node.lineno, name) for name in names if private(name))


def private_names_defined(tree: ast.AST) -> set[str]:
    """Underscore names that a module makes itself: functions, classes, variables, attributes stored on `self`."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names |= {node.attr} if isinstance(node.value, ast.Name) and node.value.id == "self" else set()
    return names


def acts_at_import(statement: ast.stmt) -> bool:
    """Whether a top-level statement does more than define: a bare call, a loop, a `with`, an `if` that acts."""
    if isinstance(statement, ast.Expr):
        return not isinstance(statement.value, ast.Constant)
    if isinstance(statement, ast.If):
        if ast.unparse(statement.test) in {"__name__ == '__main__'", "TYPE_CHECKING"}:
            return any(acts_at_import(child) for child in statement.orelse)
        return any(acts_at_import(child) for child in (*statement.body, *statement.orelse))
    if isinstance(statement, ast.Try):
        handlers = [child for handler in statement.handlers for child in handler.body]
        return any(acts_at_import(child) for child in (*statement.body, *handlers, *statement.orelse))
    if isinstance(statement, ast.Assign | ast.AugAssign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        return not all(isinstance(target, ast.Name | ast.Tuple) for target in targets)
    allowed = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Pass
    return not isinstance(statement, allowed)


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def broken(rule: Callable[[ast.Module], object], *trees: str) -> dict[str, object]:
    """What a rule finds in the modules of some trees, by their paths; modules that keep it are left out."""
    chosen = [path for tree, path in MODULES if tree in trees]
    assert {tree for tree, _ in MODULES} >= set(trees), "a tree without modules would keep every rule"
    findings = {str(path.relative_to(ROOT)): rule(parse(path)) for path in chosen}
    return {path: finding for path, finding in findings.items() if finding}


def test_the_overlay_imports_neither_of_our_packages() -> None:
    assert broken(lambda tree: imported(tree) & {"m3po_lab", "patchset"}, "overlay") == {}


def test_the_overlay_tool_imports_the_standard_library_only() -> None:
    assert broken(lambda tree: imported(tree) - sys.stdlib_module_names - {"patchset"}, "patchset") == {}


def test_the_lab_uses_no_private_name_of_an_upstream() -> None:
    """A private name is allowed where one of the lab's own modules makes it; every other one is somebody else's."""
    own = set().union(*(private_names_defined(parse(path)) for tree, path in MODULES if tree == "m3po_lab"))
    foreign = broken(lambda tree: [use for use in private_names_used(tree) if use[1] not in own], "m3po_lab")
    assert foreign == {}


def test_importing_a_module_does_nothing() -> None:
    acts = broken(lambda tree: [line.lineno for line in tree.body if acts_at_import(line)], *TREES)
    assert acts == {}


@functools.cache
def module_imports() -> dict[str, set[str]]:
    """Each of our modules with those of our modules that it imports, also within functions and under TYPE_CHECKING."""
    paths = {}
    for source in SOURCES:
        for path in source.rglob("*.py"):
            parts = path.relative_to(source).with_suffix("").parts
            paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found = {}
    for name, path in paths.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        names: set[str] = set()
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                module = node.module or ""
                if node.level:
                    module = importlib.util.resolve_name("." * node.level + module, package)
                names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        found[name] = names & paths.keys() - {name}
    return found


def room(module: str) -> str:
    """The sub-package of m3po_lab that a module lies in; a module beside the sub-packages is its own."""
    return ".".join(module.split(".")[:2])


def cycle(imports: Mapping[str, set[str]]) -> list[str]:
    """The modules of an import cycle in order; none where there is no cycle."""
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_import_cycle_between_modules() -> None:
    assert cycle(module_imports()) == []


def test_no_import_cycle_between_the_rooms_of_the_lab() -> None:
    rooms: dict[str, set[str]] = {}
    for module, names in module_imports().items():
        if module.startswith("m3po_lab."):
            others = {room(name) for name in names if name.startswith("m3po_lab.")}
            rooms.setdefault(room(module), set()).update(others - {room(module)})
    assert len(rooms) > 8 and cycle(rooms) == []


def test_a_cycle_is_seen() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) and cycle({"a": {"b"}, "b": set()}) == []


@pytest.mark.parametrize(
    "source",
    [
        "print('x')",
        "import torch\ntorch.set_num_threads(2)",
        "import os\nos.environ['X'] = '1'",
        "import transformers\ntransformers.Trainer.train = None",
        "for x in y: f(x)",
        "if DEBUG:\n    log()",
        "try:\n    f()\nexcept OSError:\n    pass",
        "with open('x') as f: y = 1",
    ],
)
def test_the_import_rule_sees_a_module_that_acts(source: str) -> None:
    assert any(acts_at_import(statement) for statement in ast.parse(source).body)


@pytest.mark.parametrize(
    "source",
    [
        "from trl.trainer.utils import _fused_forward",
        "import trl._lazy",
        "def f(trainer): return trainer._metrics",
        "def f(model): return getattr(model, '_no_split_modules')",
        "class T(Trainer):\n    def f(self): return self._signature_columns",
    ],
)
def test_the_private_name_rule_sees_each_way_to_use_one(source: str) -> None:
    tree = ast.parse(source)
    assert [name for _, name in private_names_used(tree) if name not in private_names_defined(tree)]
