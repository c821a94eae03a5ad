# SPDX-License-Identifier: Apache-2.0
"""A model whose weights a trainer gives: none are read, and on a CPU it stays such that they can be given again."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

FROM_TRAINER = "m3po_trainer"  # for vLLM's load_format


@register_model_loader(FROM_TRAINER)
class TrainerLoader(DummyModelLoader):
    """Random weights, until others are given.

    On a CPU vLLM packs the weights of its linear layers when it has loaded them, and keeps nothing to load into again;
    here they multiply as they are.
    """

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        super().load_weights(model, model_config)
        for layer in model.modules():
            layer._cpu_skip_gemm_dispatch = True  # type: ignore[assignment]  # no tensor

    def load_model(self, *args: Any, **kwargs: Any) -> torch.nn.Module:
        model = super().load_model(*args, **kwargs)
        for layer in model.modules():
            if hasattr(layer, "cpu_linear"):  # the head, whose packed copy would stay as it was
                layer.cpu_linear = torch.nn.functional.linear
        return model
