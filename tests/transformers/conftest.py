# SPDX-License-Identifier: Apache-2.0
"""SmolLM2's tokenizer, read once a session: reading the vocabulary out of a GGUF file takes a while."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> Any:
    """The tokenizer of the embedded model, with the repair that the training script gives it."""
    from transformers import AutoTokenizer

    from m3po_lab.models import embedded_gguf, repair_embedded

    file = embedded_gguf()
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    repair_embedded(SimpleNamespace(config=SimpleNamespace(), generation_config=SimpleNamespace()), tokenizer)
    return tokenizer
