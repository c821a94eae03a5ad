# SPDX-License-Identifier: Apache-2.0
"""The list of hook points in patches/README.md is that of the patched files, and no hook is without a caller."""

import ast
from collections.abc import Iterator
from pathlib import Path

from transformers.m3po import hooks as model_hooks
from trl.trainer.m3po import hooks as trainer_hooks

from patchset import pins, series

ROOT = Path(__file__).resolve().parents[2]
HOLDERS = {"hooks", "m3po", "m3po_rows", "ScoredRows"}  # what the patched files call the modules and objects of ours
MODULES = ("m3po.hooks", "models.m3po", "chunked_logprob_torch")


def patched_files() -> list[Path]:
    return sorted(
        {up.checkout / file.path for up in pins.load(ROOT) for patch in series.load(up) for file in patch.files()}
    )


def holder(node: ast.expr) -> str:
    """The last name of what an attribute is read from: `m3po` of `self.m3po`, and of `(m3po or torch)`."""
    if isinstance(node, ast.BoolOp):
        return holder(node.values[0])
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def called(file: Path) -> Iterator[str]:
    """The names of ours that a patched file uses."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    has_hooks = any(
        alias.name == "hooks" and (node.module or "").endswith("m3po") for node in imports for alias in node.names
    )
    for node in imports:
        if (node.module or "").endswith(MODULES):
            yield from (alias.name for alias in node.names)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        ours = holder(node.value) in HOLDERS - (set() if has_hooks else {"hooks"})
        if ours or node.attr.startswith("m3po_") or holder(node.value).endswith(MODULES):
            yield node.attr


def listed() -> set[str]:
    """The names in the third column of the numbered rows."""
    page = (ROOT / "patches" / "README.md").read_text(encoding="utf-8")
    rows = [
        line.split("|") for line in page.splitlines() if line.startswith("| ") and line.split("|")[1].strip().isdigit()
    ]
    assert [int(row[1]) for row in rows] == list(range(1, len(rows) + 1))
    return {name for row in rows for name in row[3].split("`")[1::2]}


def test_the_list_has_every_name_that_the_patched_files_use_and_no_other() -> None:
    used = {name for file in patched_files() for name in called(file)}
    assert used == listed()


def test_every_hook_has_a_caller() -> None:
    used = {name for file in patched_files() for name in called(file)}
    assert {*model_hooks.__all__, *trainer_hooks.__all__} <= used
