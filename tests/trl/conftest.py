# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of TRL: one thread (tiny models wait for each other on two), and the tiny GRPO runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from reference.threads import one_thread  # noqa: F401


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The module `tiny_grpo.py`, loaded by its path: test folders are no packages."""
    spec = importlib.util.spec_from_file_location("tiny_grpo", Path(__file__).with_name("tiny_grpo.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
