# SPDX-License-Identifier: Apache-2.0
"""A model with hyper-connections is refused where Unsloth's fast paths would leave them out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch

REFUSED = r"mhc_enabled=True does not work with Unsloth"


def test_hyper_connections_are_refused_in_one_line(fast: Callable[..., Any]) -> None:
    from unsloth import FastLanguageModel

    net = cases.model("llama", next(iter(cases.CASES)))
    config = type(net.config)(**{**net.config.to_dict(), "mhc_enabled": True})
    quick = fast(type(net)(config))
    ids = torch.tensor([[4, 5, 9]])
    for attempt in (
        lambda: quick(input_ids=ids),
        lambda: quick.generate(input_ids=ids, max_new_tokens=2),
        lambda: FastLanguageModel.get_peft_model(quick, **cases.LORA),
    ):
        with pytest.raises(ValueError, match=REFUSED) as error:
            attempt()
        assert "\n" not in str(error.value)
