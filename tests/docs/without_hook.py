# SPDX-License-Identifier: Apache-2.0
"""Take each hook of a family out of its model file, in memory, and see the tests fail: the test of the battery itself.

    bash scripts/run.sh python tests/docs/without_hook.py qwen3 [smollm3 ...]

A line for every hook: the first test that fails without it. A hook that no test misses is an error, and so is a test of
these that fails with all hooks too. The files of `vendor/` are not written; tests/docs/ is left out, because it reads
the files.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import os
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from types import ModuleType
from typing import ClassVar

TESTS = Path(__file__).resolve().parents[1]
RUN_OVER = [str(TESTS / part) for part in ("transformers", "invariants", "trl")]
INSTEAD = {  # of calls whose value is wanted: what the file says where the hook does nothing
    "read_streams": "hidden_states, None",
    "write_streams": "residual + hidden_states",
    "pop_aslr_inputs": "None",
    "thinking_residual": "embeds",
}


def hooks_of(text: str, hooks: Collection[str]) -> Iterator[tuple[str, str]]:
    """Every call of a hook in a model file, `mhc_gate` handed on too, with the file without it."""
    tree = ast.parse(text)
    counts: dict[str, int] = {}
    statements = (ast.Expr, ast.Assign, ast.AnnAssign, ast.Return)
    for statement in [node for node in ast.walk(tree) if isinstance(node, statements)]:
        call = statement.value
        if not isinstance(call, ast.Call):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if name in hooks:
            instead = INSTEAD.get(name)
            # A hook that gives back what it was given is taken out with its line.
            node, new = (call, instead) if instead else (statement, "pass")
        elif handed_on := [word for word in call.keywords if word.arg == "mhc_gate"]:
            name, node, new = "mhc_gate=", handed_on[0], "mhc_gate=None"
        else:
            continue
        counts[name] = counts.get(name, 0) + 1
        yield f"{name} {counts[name]}" if counts[name] > 1 else name, replaced(text, node, new)


def replaced(text: str, node: ast.expr | ast.stmt | ast.keyword, new: str) -> str:
    old = ast.get_source_segment(text, node)
    lines = text.splitlines(keepends=True)
    start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset  # the files are ASCII up to there
    if old is None or text[start : start + len(old)] != old:
        raise ValueError(f"line {node.lineno} is not where it was looked for")
    return text[:start] + new + text[start + len(old) :]


def failures(module: ModuleType, text: str, chosen: list[str]) -> list[str]:
    """Run tests in a process of its own with this text for a model file: those that failed."""
    import pytest

    class Failed:
        names: ClassVar[list[str]] = []

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            self.names += [report.nodeid] * report.failed

        pytest_collectreport = pytest_runtest_logreport

    out, into = os.pipe()
    child = os.fork()
    if not child:
        run_as(module, text)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            pytest.main(["-q", "-p", "no:xdist", "-p", "no:cacheprovider", *chosen], [Failed()])
        os.write(into, "\n".join(Failed.names).encode())
        os._exit(0)
    os.close(into)
    with os.fdopen(out) as pipe:
        failed = pipe.read().splitlines()
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("the tests did not come to an end")
    return failed


def run_as(module: ModuleType, text: str) -> None:
    """Make a module anew from this text, its classes in every place that has imported them."""
    own = (value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__)
    before = {value.__name__: value for value in own}
    exec(compile(text, str(module.__file__), "exec", dont_inherit=True), module.__dict__)
    for other in [*sys.modules.values()]:
        for name, old in before.items():
            if getattr(other, "__dict__", {}).get(name) is old:
                setattr(other, name, getattr(module, name))


def main(families: list[str]) -> int:
    sys.path[:0] = [str(TESTS)]
    import torch
    from transformers.m3po.hooks import __all__ as hooks

    torch.set_num_threads(1)  # before a child is made
    for name in ("pytest", "trl.trainer.grpo_trainer"):  # once, for every child
        importlib.import_module(name)
    wrong = 0
    for family in families:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        text = Path(str(module.__file__)).read_text(encoding="utf-8")
        found = set()
        for name, without in hooks_of(text, hooks):
            failed = failures(module, without, ["-x", "-k", family, *RUN_OVER])
            found |= set(failed)
            wrong += not failed
            print(f"{family:<10} {name:<24} {failed[0] if failed else 'MISSED BY ALL TESTS'}", flush=True)
        for test in failures(module, text, sorted(found)):
            wrong += 1
            print(f"{family:<10} {'with all hooks':<24} {test}", flush=True)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
