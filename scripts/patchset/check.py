# SPDX-License-Identifier: Apache-2.0
"""check: proves patches/ and overlay/ from the cached wheels alone, in a temporary folder, without vendor/.

Lint, apply to the pristine tree, export again byte for byte, compile what we touch, import the patched packages.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from patchset import build, checkout, export, git, series, state, table, wheels
from patchset.common import Drift, progress
from patchset.pins import Upstream

# argv: the modules to import; the folders they must come from are on PYTHONPATH.
IMPORT = """
import importlib, os, sys
for name in sys.argv[1:]:
    file = os.path.realpath(importlib.import_module(name).__file__)
    if not any(file.startswith(os.path.realpath(p) + os.sep) for p in os.environ["PYTHONPATH"].split(os.pathsep)):
        sys.exit(f"{name} was imported from {file}, not from the patched tree")
"""


def check(root: Path, ups: list[Upstream]) -> list[str]:
    """Run every step for every upstream; returns one line each. Drift or Refused names the first thing wrong."""
    series_by_name = {up.name: series.load(up) for up in ups}
    lines, trees, modules = [], [], []
    with tempfile.TemporaryDirectory(prefix="patchset-") as temp:
        for up in ups:
            wheels.ensure(up)
            patches, fresh = series_by_name[up.name], state.overlay_files(up)
            if not patches and not fresh:
                lines.append(f"{up.name} {up.version}: ok (wheel of {len(wheels.read(up))} files, nothing to lay on)")
                continue
            repo = build.scratch(Path(temp, "git", up.name))
            built = build.build(repo, up, patches)
            checkout.require_free(repo, up, built.pristine, fresh)
            touched = [f.path for p in patches for f in p.files() if not f.deleted]
            _compile(up, repo, built.patched, touched, fresh)
            again = export.series_of(repo, up, built.pristine, built.patched)
            if odd := export.compare(up, again):
                head = f"{up.name}: does not round-trip: exporting the applied series gives other bytes:"
                way_out = "  apply it, then export (make apply-patches export-patches) writes the canonical form"
                raise Drift("\n".join([head, *export.describe(up, odd), way_out]))
            if up.imports:
                trees.append(write_tree(up, repo, built.patched, fresh, Path(temp, "trees", up.name)))
                modules += [*up.imports, *module_names(up, [*touched, *fresh])]
            lines.append(f"{up.name} {up.version}: ok ({len(patches)} patches, {len(fresh)} new files)")
        table.refresh(root, check=True)
        if modules:
            lines.append(import_modules(root, trees, list(dict.fromkeys(modules)), temp))
    return lines


def _compile(up: Upstream, repo: git.Git, commit: str, touched: list[str], fresh: list[str]) -> None:
    sources = {path: repo("cat-file", "blob", f"{commit}:{path}") for path in touched}
    sources |= {path: (up.overlay / path).read_bytes() for path in fresh}
    for path, data in sources.items():
        try:
            if path.endswith(".py"):
                compile(data, path, "exec", dont_inherit=True)
        except (SyntaxError, ValueError) as error:
            raise Drift(f"{up.name}: {path} does not compile: {error}") from None


def write_tree(up: Upstream, repo: git.Git, tree: str, fresh: list[str], folder: Path) -> Path:
    """The patched tree with copies of the new files; returns the folder for the module search path."""
    folder.mkdir(parents=True)
    git.Git(repo.git_dir, folder, repo.git_dir / "tree.index")("read-tree", "--reset", "-u", tree)
    for path in fresh:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes((up.overlay / path).read_bytes())
    return folder if up.prefix == "." else folder / up.prefix


def module_names(up: Upstream, paths: list[str]) -> list[str]:
    """The module names of those paths that lie in the packages to import."""
    inside = [
        path if up.prefix == "." else path.removeprefix(f"{up.prefix}/") for path in paths if path.endswith(".py")
    ]
    parts = [path.removesuffix(".py").removesuffix("/__init__").split("/") for path in inside]
    return [".".join(names) for names in parts if names[0] in up.imports and all(name.isidentifier() for name in names)]


def import_modules(root: Path, trees: list[Path], modules: list[str], temp: str) -> str:
    """Import `modules` from `trees` in the project's environment; Drift with the last line of what went wrong."""
    python = root / ".venv" / "bin" / "python"
    if not python.exists():
        python = Path(sys.executable)
        if importlib.util.find_spec("torch") is None:
            return "imports: left out, there is no .venv and this Python has no torch (make env)"
    progress(f"importing {len(modules)} modules of the patched trees")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, trees)), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([python, "-c", IMPORT, *modules], env=env, cwd=temp, capture_output=True, text=True)
    if done.returncode:
        raise Drift(f"imports: {(done.stderr.strip().splitlines() or ['failed without a message'])[-1]}")
    return f"imports: ok ({len(modules)} modules)"
