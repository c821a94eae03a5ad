# SPDX-License-Identifier: Apache-2.0
"""Tiny models for the tests of ASLR."""

from __future__ import annotations

import pytest
from reference.gated import STRONG


@pytest.fixture
def make(family):
    """Makes tiny plain models of 64 tokens; `make(**ON)` makes one with the modules at their start."""
    return lambda **config: family(**{"vocab_size": 64, "intermediate_size": 32, **config})


@pytest.fixture
def make_for_mode(family):
    """Makes tiny models without ASLR for a mode: 28 tokens, weights so large that a refinement moves the logits."""

    def make(mode="none", **config):
        gate = STRONG if mode in ("hrpo", "h3po") else {}
        return family(**{"vocab_size": 28, "initializer_range": 0.2, "intermediate_size": 32, **gate, **config})

    return make
