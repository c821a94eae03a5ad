# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint's `m3po.json` says of its modules: whether it has them, fresh ones of their shape, a difference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers.m3po.aslr.settings import ASLR_DEFAULTS
from transformers.m3po.modules import ADDED_MODULES, ASLR, GATING, HYPER_CONNECTIONS, RESIDUAL_GATE

STORED: dict[str, dict[str, Any]] = {
    "plain": {"mode": "none"},
    "residual gate": {"mode": "hrpo", "thinking_residual_r_min": 0.9, "thinking_residual_r_max": 0.99},
    "ASLR": {"mode": "m3po", "aslr_enabled": True, **ASLR_DEFAULTS, "aslr_num_paths": 3},
    "learnable gating function": {"mode": "m3po", "gating_type": "luong", "gating_config": {"rank": 4}},
}
MODULES = {"residual gate": RESIDUAL_GATE, "ASLR": ASLR, "learnable gating function": GATING}


@pytest.mark.parametrize("kind", STORED)
def test_attached_modules_are_those_that_the_file_says(kind: str, tiny_llama: Callable[..., Any]) -> None:
    model, stored = tiny_llama(), STORED[kind]
    assert [modules for modules in ADDED_MODULES if modules.belongs(stored)] == [
        modules for name, modules in MODULES.items() if name == kind
    ]
    if kind not in MODULES:
        assert all(modules.difference(model, stored) is None for modules in ADDED_MODULES)
        return
    modules = MODULES[kind]
    assert not modules.on(model) and modules.difference(model, stored) is not None
    modules.attach(model, stored)
    assert modules.on(model) and modules.difference(model, stored) is None
    names = {name.removeprefix("model.") for name in modules.among(model.state_dict())}
    assert set(modules.parameters(stored)) <= names


@pytest.mark.parametrize(
    ("kind", "changes", "difference"),
    [
        ("residual gate", {"mode": "m3po"}, ("thinking_residual_enabled", False, True)),
        ("ASLR", {"aslr_num_paths": 4}, ("aslr_num_paths", 4, 3)),
        ("ASLR", {"aslr_enabled": False}, ("aslr_enabled", False, True)),
        ("learnable gating function", {"gating_config": {"rank": 8}}, ("rank", 8, 4)),
        (
            "learnable gating function",
            {"gating_type": "baseline", "gating_config": {}},
            ("gating_type", "baseline", "luong"),
        ),
    ],
)
def test_a_difference_names_both_values(
    kind: str, changes: dict[str, Any], difference: tuple[str, Any, Any], tiny_llama: Callable[..., Any]
) -> None:
    model = tiny_llama()
    MODULES[kind].attach(model, STORED[kind])
    assert MODULES[kind].difference(model, STORED[kind] | changes) == difference


def test_a_gating_function_of_another_version_belongs_to_no_checkpoint_here() -> None:
    assert not GATING.belongs({"mode": "m3po", "gating_type": "of_next_year"})


def test_hyper_connections_are_not_given_to_a_plain_model(tiny_llama: Callable[..., Any]) -> None:
    with pytest.raises(NotImplementedError, match="made with the model"):
        HYPER_CONNECTIONS.attach(tiny_llama(), {})
