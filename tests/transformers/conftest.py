# SPDX-License-Identifier: Apache-2.0
"""What several files share: SmolLM2's tokenizer, read once a session (out of a GGUF file it takes a while); threads."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> Any:
    """The tokenizer of the embedded model, with the repair that the training script gives it."""
    from transformers import AutoTokenizer

    from m3po_lab.models.embedded import embedded_gguf, repair_embedded

    file = embedded_gguf()
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    repair_embedded(SimpleNamespace(config=SimpleNamespace(), generation_config=SimpleNamespace()), tokenizer)
    return tokenizer


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A second thread only waits for the first with matrices this small, and on a busy machine it waits for long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
