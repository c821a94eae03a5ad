# SPDX-License-Identifier: Apache-2.0
"""Looking at a model without changing it: every evaluation and every report looks through `unchanged`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def unchanged_random_state() -> Iterator[None]:
    """Put the generators of Python, numpy and torch back as they were, whatever happens inside."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


@contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """Leave the model and the random generators as they are: a training goes on afterwards, and a resumed one skips it.

    The mode of every module and the gradients (none inside) are put back too, whatever happens inside. `tie_weights`
    does nothing there: lm-eval calls it on a model in memory, and where an adapter trains one half of a tied pair, that
    would make it another model.

    Args:
        model: as it is trained, an adapter's with its wrapper.
    """
    modes = {module: module.training for module in model.modules()}
    gradients = {value: value.grad for value in model.parameters()}
    for value in gradients:
        value.grad = None
    model.tie_weights = lambda: None
    try:
        with unchanged_random_state():
            yield
    finally:
        del model.tie_weights
        for value, gradient in gradients.items():
            value.grad = gradient
        for module, training in modes.items():
            module.training = training
