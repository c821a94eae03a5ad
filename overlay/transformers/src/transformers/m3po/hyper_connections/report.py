# SPDX-License-Identifier: Apache-2.0
"""What the hyper-connections of a model do on a batch, and whether they do anything at all.

Axes: D = 2L sublayers, in the order in which they run; M positions that are no padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..flags import has_hyper_connections
from .connections import MHC_MODULES, DynamicMHC
from .doubly_stochastic import birkhoff, sinkhorn
from .settings import MHC_BIRKHOFF

# Below these, in nats and in Frobenius norm. 1e-4 nats is what reference runs took for no effect.
NO_EFFECT, NO_MIXING = 1e-4, 1e-6
_HALVES = {"mhc_attn": "attn", "mhc_mlp": "mlp"}


def mixers(model: Any) -> dict[str, DynamicMHC]:
    """The 2L modules by layer and sublayer, as "0.attn", in the order in which they run.

    Raises:
        ValueError: the model has none.
    """
    base = model.base_model
    if not has_hyper_connections(base):
        raise ValueError(f"a {type(model).__name__} without hyper-connections has nothing to report: set mhc_enabled.")
    return {
        f"{index}.{_HALVES[name]}": getattr(layer, name)
        for index, layer in enumerate(base.layers)
        for name in MHC_MODULES[:2]
    }


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """All modules in evaluation mode, and afterwards each in the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _recorded(model: Any) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Each sublayer's streams (B, T, S, H) and H_res (B, T, S, S), in evaluation mode, as a list that fills."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watch(mixer: DynamicMHC) -> None:
        def get_matrices(x: torch.Tensor, gate: torch.Tensor | None = None) -> Any:
            matrices = DynamicMHC.get_matrices(mixer, x, gate)
            seen.append((x, matrices[0]))
            return matrices

        mixer.get_matrices = get_matrices  # type: ignore[method-assign]

    watched = list(mixers(model).values())
    for mixer in watched:
        watch(mixer)
    try:
        with _evaluating(model):
            yield seen
    finally:
        for mixer in watched:
            del mixer.get_matrices


def start_matrix(mixer: DynamicMHC) -> torch.Tensor:
    """H_res at the start, (S, S) float64: with φ = 0 it is the same at each position."""
    logits = mixer.start_bias()[2 * mixer.num_streams :]
    if mixer.residual == MHC_BIRKHOFF:
        return birkhoff(logits, mixer.basis.cpu())
    return sinkhorn(logits.view(mixer.num_streams, -1), mixer.sinkhorn_iters, mixer.sinkhorn_tau)


@torch.no_grad()
def routing_report(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What H_res and the streams are on a batch.

    Args:
        model: with hyper-connections, with or without its head.
        inputs: of its forward, `input_ids` (B, T) and, where there is padding, `attention_mask`; `mhc_gate` counts.

    Returns:
        sublayers: for each of the D, by the names of `mixers`: `row_error` and `column_error`, the largest distance of
            a sum from 1; `from_start` and `from_identity`, Frobenius norms averaged over positions; `stream_cosine`,
            the mean cosine of two of its input's streams (1 where there is only one).
        composite_gain_rows, composite_gain_columns: of the product of all H_res, the largest sum of absolute values in
            a row (what a signal can grow by on its way up) and in a column (a gradient, down), means over positions:
            1 for doubly stochastic matrices.
    """
    with _recorded(model) as seen:
        model(**{**inputs, "use_cache": False})
    keep = _kept(inputs, seen[0][0])
    figures, product = [], None
    for mixer, (streams, mixing) in zip(mixers(model).values(), seen, strict=True):
        mixing, streams = mixing[keep], streams[keep].float()  # (M, S, S), (M, S, H)
        identity = torch.eye(mixer.num_streams, dtype=mixing.dtype, device=mixing.device)
        numbers = {
            "row_error": (mixing.sum(-1) - 1).abs().max(),
            "column_error": (mixing.sum(-2) - 1).abs().max(),
            "from_start": (mixing - start_matrix(mixer).to(mixing)).norm(dim=(-2, -1)).mean(),
            "from_identity": (mixing - identity).norm(dim=(-2, -1)).mean(),
            "stream_cosine": _cosine(streams),
        }
        names = list(numbers)
        figures.append(torch.stack([value.float() for value in numbers.values()]))
        product = mixing if product is None else product @ mixing
    assert product is not None
    gains = torch.stack([product.abs().sum(axis).amax(-1).mean() for axis in (-1, -2)]).tolist()
    rows = torch.stack(figures).tolist()
    return {
        "sublayers": {name: dict(zip(names, row, strict=True)) for name, row in zip(mixers(model), rows, strict=True)},
        "composite_gain_rows": gains[0],
        "composite_gain_columns": gains[1],
    }


@torch.no_grad()
def mean_matrices(model: Any, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """H_res of each sublayer, (S, S) float32, the mean over the positions of a batch; arguments of `routing_report`."""
    with _recorded(model) as seen:
        model(**{**inputs, "use_cache": False})
    keep = _kept(inputs, seen[0][0])
    return {name: mixing[keep].mean(0).float() for name, (_, mixing) in zip(mixers(model), seen, strict=True)}


def _kept(inputs: Mapping[str, Any], streams: torch.Tensor) -> torch.Tensor:
    """(B, T) bool, the positions that are no padding."""
    mask = inputs.get("attention_mask")
    return (torch.ones(streams.shape[:2]) if mask is None else mask).bool().to(streams.device)


def _cosine(streams: torch.Tensor) -> torch.Tensor:
    """The mean cosine of two streams of a position, (M, S, H) -> scalar; 1 where S is 1."""
    count = streams.shape[-2]
    if count == 1:
        return streams.new_ones(())
    unit = torch.nn.functional.normalize(streams, dim=-1)
    # |Σ u_s|² = S + Σ_{s ≠ t} u_s · u_t
    return ((unit.sum(-2).square().sum(-1) - count) / (count * (count - 1))).mean()


@torch.no_grad()
def gate_effect(model: Any, inputs: Mapping[str, Any], gates: tuple[Any, Any] = (0.0, 1.0)) -> float:
    """KL divergence, in nats, of the next-token distributions at the first gate from those at the second; mean over
    positions.

    Args:
        model: with hyper-connections and its head.
        inputs: of its forward, without `mhc_gate`; positions of padding do not count.
        gates: two of those that its forward takes.
    """
    mixers(model)
    with _evaluating(model):
        off, on = (
            model(**{**inputs, "mhc_gate": gate, "use_cache": False}).logits.float().log_softmax(-1) for gate in gates
        )
    kl = (on.exp() * (on - off)).sum(-1)
    mask = inputs.get("attention_mask")
    return float(kl.mean() if mask is None else kl[mask.bool()].mean())


def gradient_norms(model: Any) -> dict[str, dict[str, float]]:
    """After a backward pass, for each sublayer: norms of the gradient at the parts of φ and b for H_pre, H_post, H_res.

    Keys `pre`, `post`, `res` are of b, `phi_pre` and so on of φ, `scale` of the three α. No gradient counts as 0.
    """
    results: dict[str, dict[str, torch.Tensor]] = {}
    for name, mixer in mixers(model).items():
        own = {key: torch.zeros_like(value) if value.grad is None else value.grad for key, value in
               mixer.named_parameters()}  # fmt: skip
        results[name] = {
            **dict(zip(("pre", "post", "res"), own["bias"].split(mixer.sizes), strict=True)),
            **dict(zip(("phi_pre", "phi_post", "phi_res"), own["phi"].split(mixer.sizes), strict=True)),
            "scale": own["scale_bias"],
        }
    rows = torch.stack([torch.stack([part.float().norm() for part in parts.values()]) for parts in results.values()])
    return {
        name: dict(zip(parts, row, strict=True))
        for (name, parts), row in zip(results.items(), rows.tolist(), strict=True)
    }


def full_report(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """`routing_report` with `gate_effect` and the `verdicts` on both; the model needs its head."""
    report = {**routing_report(model, inputs), "gate_effect": gate_effect(model, inputs)}
    return {**report, "verdicts": verdicts(report)}


def verdicts(report: Mapping[str, Any]) -> list[str]:
    """What is wrong, one line each; nothing where the hyper-connections route and the gate moves the output.

    At the start the second line is true by construction: H_res leaves the mean of equal streams alone. It is a verdict
    on a model that has been trained.
    """
    results = []
    apart = {name: numbers["from_identity"] for name, numbers in report["sublayers"].items()}
    stuck = [name for name, distance in apart.items() if distance < NO_MIXING]
    if stuck:
        results.append(
            f"H_res is the identity in {len(stuck)} of {len(apart)} sublayers ({stuck[0]} first): it gets no gradient "
            "there and cannot learn; set mhc_sinkhorn_tau=1.0 and mhc_diagonal_bias to about 5."
        )
    effect = report.get("gate_effect")
    if effect is not None and not effect >= NO_EFFECT:
        results.append(
            f"gate has no effect: {effect:.1e} nats between mhc_gate=0 and 1, below {NO_EFFECT:.0e}; a controller of "
            "this gate would tune nothing."
        )
    return results
