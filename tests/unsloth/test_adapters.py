# SPDX-License-Identifier: Apache-2.0
"""`get_peft_model` and loading: our modules are trained whole, in float32, saved with the adapter, never quantised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from safetensors import safe_open
from transformers.quantizers.quantizers_utils import should_convert_module

SIZES = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}


def test_an_adapter_trains_and_saves_our_modules_in_float32(fast: Callable[..., Any], tmp_path: Path) -> None:
    from unsloth import FastLanguageModel

    net = cases.model("qwen2", "h3po-aslr")
    names, loaded = cases.own_names(net), fast(net, dtype=torch.bfloat16)
    for name in names:  # as a load in bf16 leaves them; upstream casts fp16 alone
        getattr(loaded.model, name).bfloat16()
    quick = FastLanguageModel.get_peft_model(loaded, **SIZES)
    own = {name: value for name, value in quick.named_parameters() if "modules_to_save" in name}
    assert len(names) == 6 and all(any(name in key for key in own) for name in names)
    assert all(value.requires_grad and value.dtype == torch.float32 for value in own.values())
    assert quick.get_base_model().model.embed_tokens.weight.dtype == torch.float16  # what Unsloth takes without bf16
    quick.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as weights:
        assert all(any(name in key for key in weights.keys()) for name in names)  # noqa: SIM118


def test_a_module_that_nobody_knows_is_still_refused(fast: Callable[..., Any]) -> None:
    from unsloth import FastLanguageModel

    with pytest.raises(TypeError, match="mlp is not allowed"):
        FastLanguageModel.get_peft_model(fast(cases.model("llama", "none")), modules_to_save=["mlp"], **SIZES)


def test_loading_in_4_bit_leaves_our_modules_alone() -> None:
    from unsloth.models.m3po import UNQUANTIZED

    net = cases.model("llama", "h3po-aslr")
    linear = [name for name, module in net.named_modules() if isinstance(module, torch.nn.Linear)]
    left = {name for name in linear if not should_convert_module(name, UNQUANTIZED)}
    ours = {name for name in linear if any(part in name for part in cases.own_names(net))}
    assert ours and left == ours
