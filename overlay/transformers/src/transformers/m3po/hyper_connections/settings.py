# SPDX-License-Identifier: Apache-2.0
"""The hyperparameters of the hyper-connections (mHC), with their rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MHC_SINKHORN, MHC_BIRKHOFF = "sinkhorn", "birkhoff"
MHC_DEFAULTS: dict[str, Any] = {
    "mhc_num_streams": 4,
    "mhc_sinkhorn_iters": 20,
    "mhc_sinkhorn_tau": 1.0,
    "mhc_residual": MHC_SINKHORN,
    "mhc_alpha": 0.01,
    "mhc_diagonal_bias": 5.0,
    "mhc_stream_offset": 1.0,
    "mhc_gate_noise": 0.0,
}
MHC_FIELDS: dict[str, tuple[type | Any, Any]] = {
    "mhc_enabled": (bool, False),
    **{
        name: (type(value) if isinstance(value, int | str) else int | float, value)
        for name, value in MHC_DEFAULTS.items()
    },
}


def check_mhc_hyperparameters(hyperparameters: Mapping[str, Any]) -> None:
    """Refuses hyperparameters that break their rule.

    Args:
        hyperparameters: all of `MHC_DEFAULTS`.

    Raises:
        ValueError: one line that names the flag and what it may be.
    """
    streams, residual = hyperparameters["mhc_num_streams"], hyperparameters["mhc_residual"]
    rules = {
        "mhc_num_streams": (streams >= 1, "at least 1; the paper has 4"),
        "mhc_sinkhorn_iters": (hyperparameters["mhc_sinkhorn_iters"] >= 1, "at least 1; the paper has 20"),
        "mhc_sinkhorn_tau": (hyperparameters["mhc_sinkhorn_tau"] > 0, "above 0; the paper has none, which is 1.0"),
        "mhc_residual": (residual in (MHC_SINKHORN, MHC_BIRKHOFF), "'sinkhorn' or 'birkhoff'"),
        "mhc_diagonal_bias": (
            0 <= hyperparameters["mhc_diagonal_bias"] <= 100,
            "in [0, 100]; about 5 learns, and from 12 on H_res hardly does",
        ),
        "mhc_stream_offset": (hyperparameters["mhc_stream_offset"] >= 0, "0 or more, in units of the state's RMS"),
        "mhc_gate_noise": (0 <= hyperparameters["mhc_gate_noise"] <= 1, "a probability, in [0, 1]"),
    }
    for name, (holds, rule) in rules.items():
        if not holds:
            raise ValueError(f"{name}={hyperparameters[name]!r} must be {rule}.")
    if residual == MHC_BIRKHOFF and streams > 4:
        raise ValueError(
            f"mhc_residual='birkhoff' with mhc_num_streams={streams}: it weighs all S! permutations, so at most 4 "
            "streams; take mhc_residual='sinkhorn'."
        )
