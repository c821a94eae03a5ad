# SPDX-License-Identifier: Apache-2.0
"""Names of a module that are loaded when they are first asked for, so that importing it imports nothing else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def loader(module: str, package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a module.

    Args:
        module: its `__name__`.
        package: its `__package__`.
        homes: in which module each name lies, relative to the package.
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        value = getattr(import_module(homes[name], package), name)
        setattr(sys.modules[module], name, value)  # from here on it is an ordinary attribute
        return value

    return load
