# SPDX-License-Identifier: Apache-2.0
"""A tiny NanoChat with hyper-connections as if trained, bytes for tokens, and a few sums."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from reference.hyper_models import trained

from m3po_lab.controller.episodes import Episodes
from m3po_lab.controller.gates import GateSpace
from m3po_lab.pretraining.data import byte_tokenizer
from m3po_lab.problems.data_sources import Problem

SUMS = [(1, 2), (3, 4), (11, 5), (20, 30), (7, 7), (100, 1), (9, 9)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Before a module's first model: tiny ones wait for each other on two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def problems() -> list[Problem]:
    return [Problem(f"What is {one} + {other}?", str(one + other)) for one, other in SUMS]


@pytest.fixture(scope="session")
def model() -> Any:
    return trained("NanoChat", vocab_size=320)


@pytest.fixture(params=["global", "layer", "sublayer"])
def episodes(request: pytest.FixtureRequest, model: Any, problems: list[Problem]) -> Episodes:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return Episodes(model, tokenizer, problems, GateSpace(request.param, 2), max_new_tokens=4, rows=5)
