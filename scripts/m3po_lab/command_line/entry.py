# SPDX-License-Identifier: Apache-2.0
"""How every command of this package starts: text that any terminal takes, and libraries that carry our patches."""

import io
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

OURS = {"transformers": "m3po", "trl": "trainer/m3po"}  # package -> a module of ours in it


def start(main: Callable[[], int]) -> NoReturn:
    """End the process with what `main` returns; with 2, and one line, where a library is not the patched one."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a letter that the locale lacks is printed as "?"
    wrong = unpatched()
    if wrong is not None:
        print(f"error: {wrong}", file=sys.stderr)
        sys.exit(2)
    sys.exit(main())


def unpatched() -> str | None:
    """What is wrong with the first library that lacks our modules, None if none does. Nothing is imported."""
    for package, ours in OURS.items():
        spec = find_spec(package)
        places = list(spec.submodule_search_locations or ()) if spec else []
        *below, name = ours.split("/")
        if PathFinder.find_spec(name, [str(Path(place, *below)) for place in places]) is None:
            reason = f"{package} in {places[0]} lacks this project's patches" if places else f"there is no {package}"
            return (
                f"{reason}: start by a script (bash scripts/run.sh python -m ... runs any module), which leaves out "
                "PYTHONPATH and the current folder; if that says the same, bash scripts/rebuild_env.sh."
            )
    return None
