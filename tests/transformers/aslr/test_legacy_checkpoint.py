# SPDX-License-Identifier: Apache-2.0
"""The reader of the prototype's `m3po_modules.bin`: files as `torch.save` writes them, of the prototype's modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.m3po import load_prototype_modules

H, P = 32, 3
MODULES = ("m3po_router", "m3po_path_collaborator", "m3po_path_aggregator")


def model(num_paths: int = P, **more: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": H, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=24, aslr_num_paths=num_paths, **{"aslr_enabled": True} | more | sizes)
    )


def seed_weights() -> dict[str, dict[str, torch.Tensor]]:
    """The state dicts of the prototype's three modules, random."""
    torch.manual_seed(1)
    attention = nn.MultiheadAttention(H, 8, batch_first=True)
    return {
        "m3po_router": {f"gate.{name}": value for name, value in nn.Linear(H, 1).state_dict().items()},
        "m3po_path_collaborator": {f"attention.{name}": value for name, value in attention.state_dict().items()},
        "m3po_path_aggregator": {
            "weight": torch.randn(P),
            **{f"weight_proj.{name}": value for name, value in nn.Linear(H, H).state_dict().items()},
        },
    }


def flat(prefix: str = "", wrapper: str = "") -> dict[str, torch.Tensor]:
    return {
        f"{prefix}{module}.{wrapper}{name}": value
        for module, state in seed_weights().items()
        for name, value in state.items()
    }


@pytest.mark.parametrize(
    "content",
    [seed_weights(), flat(), flat("model."), flat("base_model.model.model.", "modules_to_save.default.")],
    ids=["by module", "flat", "with a prefix", "of an adapter"],
)
def test_every_tensor_reaches_its_module(content: dict[str, Any], tmp_path: Path) -> None:
    torch.save(content, tmp_path / "m3po_modules.bin")
    net = model()
    load_prototype_modules(net, tmp_path / "m3po_modules.bin")
    seed, base = seed_weights(), net.model
    collaborator, attention = base.m3po_path_collaborator, seed["m3po_path_collaborator"]
    assert torch.equal(base.m3po_router.gate.weight, seed["m3po_router"]["gate.weight"])
    assert torch.equal(base.m3po_router.gate.bias, seed["m3po_router"]["gate.bias"])
    assert torch.equal(collaborator.in_proj.weight, attention["attention.in_proj_weight"])
    assert torch.equal(collaborator.in_proj.bias, attention["attention.in_proj_bias"])
    assert torch.equal(collaborator.out_proj.weight, attention["attention.out_proj.weight"])
    assert torch.equal(collaborator.out_proj.bias, attention["attention.out_proj.bias"])
    assert torch.equal(base.m3po_path_aggregator.weight, seed["m3po_path_aggregator"]["weight"])
    projection = seed["m3po_path_aggregator"]["weight_proj.weight"] - torch.eye(H)
    assert torch.equal(base.m3po_path_aggregator.weight_proj.weight, projection)


def test_the_copy_that_peft_keeps_of_the_start_is_left_out(tmp_path: Path) -> None:
    start = {name: torch.zeros_like(value) for name, value in flat("model.", "original_module.").items()}
    torch.save(start | flat("model.", "modules_to_save.default."), tmp_path / "m3po_modules.bin")
    net = model()
    load_prototype_modules(net, tmp_path / "m3po_modules.bin")
    assert torch.equal(net.model.m3po_router.gate.weight, seed_weights()["m3po_router"]["gate.weight"])


def test_collaborator_computes_what_the_prototypes_attention_does(tmp_path: Path) -> None:
    """At temperature 1, where ours is `nn.MultiheadAttention`."""
    torch.save(seed_weights(), tmp_path / "m3po_modules.bin")
    net = model()
    load_prototype_modules(net, tmp_path / "m3po_modules.bin")
    attention = nn.MultiheadAttention(H, 8, batch_first=True)
    named = seed_weights()["m3po_path_collaborator"]
    attention.load_state_dict({name.removeprefix("attention."): value for name, value in named.items()})
    paths = torch.randn(5, P, H)
    mine = net.model.m3po_path_collaborator(paths, temperature=1.0)
    torch.testing.assert_close(mine, attention(paths, paths, paths)[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content.pop("m3po_router.gate.bias"), "lacks m3po_router.gate.bias"),
        (lambda content: content.update({"m3po_router.extra": torch.ones(1)}), "has m3po_router.extra"),
        (lambda content: content.update({"lm_head.weight": torch.ones(1)}), "has lm_head.weight"),
        (lambda content: content.update({"m3po_path_aggregator.weight": torch.ones(4)}), "the aslr_num_paths"),
        (lambda content: content.update({"model.m3po_router.gate.bias": torch.ones(1)}), "gate.bias twice"),
    ],
)
def test_file_that_does_not_fit_is_refused_and_changes_nothing(change: Any, said: str, tmp_path: Path) -> None:
    content = flat()
    change(content)
    torch.save(content, tmp_path / "m3po_modules.bin")
    net = model()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=said):
        load_prototype_modules(net, tmp_path / "m3po_modules.bin")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_model_without_aslr_is_refused(tmp_path: Path) -> None:
    torch.save(flat(), tmp_path / "m3po_modules.bin")
    with pytest.raises(ValueError, match="load it with aslr_enabled=True"):
        load_prototype_modules(model(aslr_enabled=False), tmp_path / "m3po_modules.bin")


def test_code_in_the_file_is_never_run(tmp_path: Path) -> None:
    torch.save({"m3po_router": Path("anything")}, tmp_path / "m3po_modules.bin")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        load_prototype_modules(model(), tmp_path / "m3po_modules.bin")
