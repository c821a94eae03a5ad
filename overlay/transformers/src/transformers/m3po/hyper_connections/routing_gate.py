# SPDX-License-Identifier: Apache-2.0
"""The routing gate of the hyper-connections: how much of H_res is used, per row, layer and sublayer.

g = 0 is identity routing, H_res = I, and g = 1 is the full H_res, both exact; H_pre and H_post do not heed it. It is an
argument of the forward, `mhc_gate`, and never a weight.

Axes: B rows, L layers; 2 sublayers, attention and then MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..flags import has_hyper_connections

SUBLAYERS = 2
_DEFAULT = "_mhc_gate"  # attribute of the base model: in no state dict and no configuration
_HOW = "give a number, or a tensor that broadcasts to (rows, layers, 2)"


def as_gate(value: Any, layers: int, rows: int | None = None, device: torch.device | None = None) -> torch.Tensor:
    """A gate as a tensor (1 or B, L, 2) of float32, or of float64 if it came so.

    Args:
        value: a number, nested lists, or a tensor: 0-D, or 2-D and 3-D that broadcast to (B, L, 2).
        layers: L.
        rows: B; None where it is not known yet.
        device: where it is needed.

    Raises:
        ValueError: a 1-D tensor, which could mean rows or layers; a shape that does not broadcast; a value outside
            [0, 1].
    """
    gate = torch.as_tensor(value)  # moved behind the check of its values, which would wait for a GPU at each token
    gate = gate if gate.dtype == torch.float64 else gate.float()
    if gate.dim() == 1:
        raise ValueError(
            f"mhc_gate of shape {tuple(gate.shape)} could mean rows or layers: give a number or (rows, layers, 2), as "
            "gate[:, None, None] for one value per row and gate[None, :, None] for one per layer."
        )
    full = gate.reshape((1,) * (3 - gate.dim()) + tuple(gate.shape)) if gate.dim() < 3 else gate
    fits = full.dim() == 3 and all(
        size in (1, whole) for size, whole in zip(full.shape[1:], (layers, SUBLAYERS), strict=True)
    )
    if not fits or (rows is not None and full.shape[0] not in (1, rows)):
        whole = f"({'rows' if rows is None else rows}, {layers}, {SUBLAYERS})"
        raise ValueError(f"mhc_gate of shape {tuple(gate.shape)} does not broadcast to {whole}: {_HOW}.")
    if not torch.compiler.is_compiling() and not bool(((full >= 0) & (full <= 1)).all()):
        raise ValueError("mhc_gate holds a value outside [0, 1]: 0 is identity routing, 1 the full H_res.")
    return full.expand(-1, layers, SUBLAYERS).to(device=device)


def forward_gate(model: Any, value: Any, states: torch.Tensor) -> torch.Tensor | None:
    """The gate of a forward: what was given, else the stored default, else None (ungated); with noise in training.

    The noise (`mhc_gate_noise`, a probability): each row takes, with that probability, a gate drawn from U(0, 1) for
    all its layers, so that a gate set later is none that the weights have never met.

    Args:
        model: the base model.
        value: of the argument `mhc_gate`.
        states: (B, L, H), for rows and device.

    Raises:
        ValueError: see `as_gate`.
    """
    rows, layers = states.shape[0], model.config.num_hidden_layers
    value = getattr(model, _DEFAULT, None) if value is None else value
    gate = None if value is None else as_gate(value, layers, rows, states.device)
    noise = model.config.mhc_gate_noise
    if not model.training or noise == 0:
        return gate
    drawn, whether = torch.rand(2, rows, 1, 1, device=states.device)
    gate = torch.ones_like(drawn) if gate is None else gate
    return torch.where(whether < noise, drawn, gate).expand(-1, layers, SUBLAYERS)


def pop_routing_gate(generate_kwargs: dict[str, Any]) -> None:
    """Hook of `generate`: a gate without a row for each prompt becomes nested lists, which beams do not multiply.

    `generate` repeats the first axis of every tensor once for each returned sequence; of a gate for all rows that axis
    is no row. A gate of the rows goes to the CPU, where each forward looks at its values.

    Raises:
        ValueError: a 1-D tensor.
    """
    gate = generate_kwargs.get("mhc_gate")
    if isinstance(gate, torch.Tensor):
        if gate.dim() == 1:
            as_gate(gate, 1)
        generate_kwargs["mhc_gate"] = gate.tolist() if gate.dim() < 3 or gate.shape[0] == 1 else gate.cpu()


def set_mhc_gate(model: Any, value: Any) -> None:
    """Stores the gate that forwards without `mhc_gate` use; it is not saved.

    Args:
        model: with hyper-connections, with or without its head.
        value: see `as_gate`; None takes it away again, which is a gate of 1.

    Raises:
        ValueError: the model has no hyper-connections, or the gate breaks its rule.
    """
    base = model.base_model
    if not has_hyper_connections(base):
        raise ValueError(f"set_mhc_gate on a {type(model).__name__} without hyper-connections: set mhc_enabled=True.")
    gate = None if value is None else as_gate(value, base.config.num_hidden_layers).detach().clone().cpu()
    setattr(base, _DEFAULT, gate)


def set_mhc_gates_per_layer(model: Any, values: Sequence[Any] | torch.Tensor) -> None:
    """Stores one gate for each layer, or a pair (attention, MLP) for each; see `set_mhc_gate`.

    Args:
        model: with hyper-connections, L layers.
        values: L numbers or (L, 2).

    Raises:
        ValueError: another number of values than layers, or see `set_mhc_gate`.
    """
    gates, layers = torch.as_tensor(values), model.base_model.config.num_hidden_layers
    if gates.shape not in ((layers,), (layers, SUBLAYERS)):
        raise ValueError(
            f"set_mhc_gates_per_layer with values of shape {tuple(gates.shape)}: give {layers} numbers or "
            f"({layers}, 2)."
        )
    set_mhc_gate(model, gates.reshape(1, layers, -1))
