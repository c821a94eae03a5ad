# SPDX-License-Identifier: Apache-2.0
"""The flag `--gate` of the commands on hyper-connections: one routing gate, one a layer, or one a sublayer."""

from typing import Any

from m3po_lab.core.errors import UserError

HELP = (
    "the routing gate, in [0, 1]: one number, or numbers separated by commas, one for each layer, or one for each "
    "sublayer (attention and MLP of layer 0, then of layer 1, ...) (default: 1)"
)


def read_gates(text: str) -> list[float]:
    """The routing gates that the flag names.

    Raises:
        UserError: they are no numbers in [0, 1].
    """
    try:
        gates = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--gate {text}: give numbers separated by commas, e.g. 0.5 or 0.5,0.2.") from None
    if not all(0 <= gate <= 1 for gate in gates):
        raise UserError(f"--gate {text}: it must be in [0, 1]; 0 is identity routing, 1 the full H_res.")
    return gates


def gates_of(model: Any, text: str, place: str) -> float | list[list[list[float]]]:
    """The routing gate as a forward of the model takes it: a number, or (1, L, 1) or (1, L, 2) for L layers.

    Args:
        model: of the folder `place`.
        text: of the flag.
        place: for the errors.

    Raises:
        UserError: as `read_gates`; the model has no hyper-connections, or another number of layers.
    """
    from transformers.m3po.flags import has_hyper_connections

    gates = read_gates(text)
    if not has_hyper_connections(model):
        raise UserError(f"--gate {text}: {place} has no hyper-connections; leave it out.")
    layers = model.config.num_hidden_layers
    if len(gates) == 1:
        return gates[0]
    if len(gates) not in (layers, 2 * layers):
        raise UserError(
            f"--gate has {len(gates)} numbers: {place} has {layers} layers; give 1, {layers}, or {2 * layers} for "
            "attention and MLP of each in turn."
        )
    each = len(gates) // layers
    return [[gates[start : start + each] for start in range(0, len(gates), each)]]
