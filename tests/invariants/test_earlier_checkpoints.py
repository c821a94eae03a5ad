# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that an earlier version wrote load and give the same logits.

tests/fixtures/checkpoints has a tiny Llama of mode h3po with ASLR and the gating function `luong`, trained for two
steps: as a whole model, and as an adapter on a plain base. `expected.safetensors` has an input and the logits that the
version which wrote them computed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from m3po_lab.models.loading import load_model

FIXTURES = Path(__file__).parents[1] / "fixtures" / "checkpoints"


def logits_of(model: Any, expected: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits (2, 9, 24) of the recorded input with its thinking inputs and ASLR's seeds."""
    with torch.no_grad():
        return model.eval()(
            expected["input_ids"],
            thinking_bag_ids=expected["bag_ids"],
            thinking_bag_weights=expected["bag_weights"],
            aslr_row_seeds=expected["row_seeds"],
            is_m3po_inference=False,
        ).logits


def test_a_whole_model_gives_the_same_logits_and_similarities() -> None:
    expected = load_file(FIXTURES / "expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / "model")
    torch.testing.assert_close(logits_of(model, expected), expected["model_logits"], atol=1e-5, rtol=0)
    with torch.no_grad():
        probs = model(expected["input_ids"], is_m3po_inference=True).logits[:, -1].softmax(-1)
        ids = torch.arange(24).expand(1, 2, 24).int()
        similarity = model.model.m3po_gating(probs.unsqueeze(0), ids=ids, embed_tokens=model.model.embed_tokens)
    torch.testing.assert_close(similarity, expected["similarity"], atol=1e-6, rtol=0)


def test_an_adapter_gives_the_same_logits(tmp_path: Path) -> None:
    expected = load_file(FIXTURES / "expected.safetensors")
    adapter = Path(shutil.copytree(FIXTURES / "adapter", tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(FIXTURES / "base")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    model, _ = load_model(ModelConfig(model_name_or_path=str(adapter), dtype="float32"))
    torch.testing.assert_close(logits_of(model, expected), expected["adapter_logits"], atol=1e-5, rtol=0)
