# SPDX-License-Identifier: Apache-2.0
"""The modes that are compared: a model with the modules of each, and its settings. Runs without Unsloth too."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from transformers.m3po.aslr.modules import ASLR_MODULES, attach_aslr
from transformers.m3po.gating.module import GATING_MODULE, attach_gating
from transformers.m3po.modules import ADDED_MODULES
from transformers.m3po.settings import ThinkingSettings
from transformers.m3po.thinking.residual_gate import RESIDUAL_GATE_MODULES, attach_residual_gate

_spec = importlib.util.spec_from_file_location("tiny_grpo", Path(__file__).parents[1] / "trl" / "tiny_grpo.py")
assert _spec is not None and _spec.loader is not None
tiny_grpo = sys.modules["tiny_grpo"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny_grpo)
tokenizer = tiny_grpo.tokenizer

KINDS = ("llama", "qwen2", "qwen3")
# So that no path listens to one peer alone, where a gate has no gradient to speak of.
SOFT = {"cross_path_temp": 2.0}
# Name -> flags of GRPOConfig. λ is large, so that what a hook leaves out is seen in the logits.
CASES: dict[str, dict[str, Any]] = {
    "none": {"mode": "none"},
    "m3po": {"mode": "m3po"},
    "hrpo": {"mode": "hrpo"},
    "h3po": {"mode": "h3po"},
    "none-aslr": {"mode": "none", "aslr_enabled": True},
    "h3po-aslr": {"mode": "h3po", "aslr_enabled": True},
    "m3po-luong": {"mode": "m3po", "gating_type": "luong", **SOFT},
    "h3po-bahdanau": {"mode": "h3po", "gating_type": "bahdanau", **SOFT},
}
# Each case on one family, by turns: all go through the same functions of Unsloth's, but for Qwen3's attention.
BY_TURNS = [(KINDS[number % len(KINDS)], case) for number, case in enumerate(CASES)]
LAMBDA = 0.5
LORA: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def flags(case: str) -> dict[str, Any]:
    """The flags of a case, for GRPOConfig."""
    crosses = {"cross_path_lambda": LAMBDA} if CASES[case]["mode"] in ("m3po", "h3po") else {}
    return {**CASES[case], **crosses, **({"thought_top_k": 0} if CASES[case]["mode"] in ("hrpo", "h3po") else {})}


def settings(case: str) -> ThinkingSettings | None:
    """The same for a call of `generate`; None in mode `none`."""
    given = {name: value for name, value in flags(case).items() if name != "aslr_enabled"}
    return None if given["mode"] == "none" else ThinkingSettings(**given)


def model(kind: str, case: str) -> Any:
    """A tiny model with the modules of the case, as if trained; its logits are sharp and it hardly ever pads."""
    net = tiny_grpo.model(kind)
    net.lm_head.weight.data.mul_(2.5)
    net.lm_head.weight.data[0] = 0
    names: tuple[str, ...] = ()
    if CASES[case]["mode"] in ("hrpo", "h3po"):
        attach_residual_gate(net, 0.5, 0.9, seed=0)
        names += RESIDUAL_GATE_MODULES
    if CASES[case].get("aslr_enabled"):
        attach_aslr(net)
        names += ASLR_MODULES
    if "gating_type" in CASES[case]:
        attach_gating(net, CASES[case]["gating_type"])
        names += (GATING_MODULE,)
    draws = torch.Generator().manual_seed(1)
    for name in names:
        for value in getattr(net.model, name).parameters():
            value.data += 0.2 * torch.randn(value.shape, generator=draws)
    return net.eval()


def own_names(net: Any) -> list[str]:
    """The names of our modules that a model has."""
    return [name for modules in ADDED_MODULES if modules.on(net) for name in modules.names]


def lively(net: Any) -> None:
    """Gives every LoRA matrix values that are not zero, the same ones wherever the names are the same."""
    for index, (_, value) in enumerate(sorted((n, v) for n, v in net.named_parameters() if "lora_" in n)):
        value.data = 0.2 * torch.randn(value.shape, generator=torch.Generator().manual_seed(index))
