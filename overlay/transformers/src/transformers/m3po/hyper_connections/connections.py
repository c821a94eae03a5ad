# SPDX-License-Identifier: Apache-2.0
"""Manifold-constrained hyper-connections (mHC, arXiv 2512.24880): S residual streams, mixed anew at every position.

With x_s the S streams of a position, vec(x) all of them in a row, ρ its RMS, F a sublayer with its own norm:

    (p, q, r) = α ⊙ (φ vec(x) / ρ) + b                        three parts, each with its own α
    H_pre = sigmoid(p - log(S - 1)),  H_post = 2 sigmoid(q)   (S) each
    H_res = sinkhorn(r), or Σ_p softmax(r)_p P_p over the S! permutation matrices (`mhc_residual: birkhoff`)
    x'_j = Σ_i H_res[i, j] x_i + H_post[j] F(Σ_i H_pre[i] x_i)

H_res acts transposed, as in Transformers' `DeepseekV4HyperConnection`: its columns, normalised last, are the weights of
the new streams. The streams begin as x_s = x + RMS(x) o_s and end in their mean.

The start: φ = 0, b = 0 but for H_res, which leans to the identity, and offsets o_s that sum to 0. So
H_pre = 1/S, H_post = 1, and the mean of the streams, which a doubly stochastic H_res leaves alone, runs as the plain
model does. H_pre and H_post get gradient at once, and when they have told the streams apart, at the second step, H_res
does; but not that of the last sublayer, which the mean behind it undoes. (Sinkhorn's gradient is a little wider: near
the identity its rounds converge slowly, and what they leave of a row error is a way to weigh the streams. It reaches
the last sublayer too. birkhoff has none of that.) All of it is float32 whatever the model's dtype.

Axes besides those of the package: S streams.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ... import initialization as init
from ..flags import has_hyper_connections
from .doubly_stochastic import birkhoff, permutation_basis, sinkhorn, wide
from .routing_gate import forward_gate, pop_routing_gate, set_mhc_gate, set_mhc_gates_per_layer
from .settings import MHC_BIRKHOFF, MHC_DEFAULTS, check_mhc_hyperparameters

__all__ = [
    "MHC_MODULES",
    "DynamicMHC",
    "StreamOffsets",
    "add_hyper_connections",
    "add_streams",
    "birkhoff",
    "expand_streams",
    "parameters_without_decay",
    "read_streams",
    "reduce_streams",
    "set_mhc_gate",
    "set_mhc_gates_per_layer",
    "sinkhorn",
    "pop_routing_gate",
    "write_streams",
]

# Two on each decoder layer and one on the base model.
MHC_MODULES = ("mhc_attn", "mhc_mlp", "mhc_streams")
SATURATED = 40.0  # sigmoid(40) is 1 in float64 too: with one stream, H_pre is 1
_OFFSET_SEED = 24880


class DynamicMHC(nn.Module):
    """The three matrices of one sublayer, for each position from its streams.

    Args:
        dim: H.
        num_streams: S.
        sinkhorn_iters: rounds of `sinkhorn`.
        sinkhorn_tau: its temperature; 1.0 is the paper's.
        residual: "sinkhorn" or "birkhoff".
        alpha: start of the three α, which scale the dynamic part.
        diagonal_bias: how much H_res leans to the identity at its start: the logits of its diagonal stand so far above
            the others; for birkhoff, what gives the same H_res.
        eps: added to the mean square of the streams.
        index: (layer, sublayer) of the gate's axes that this one heeds.

    Raises:
        ValueError: a number breaks its rule.
    """

    part: torch.Tensor  # which α each row of φ has, 0 to 2
    basis: torch.Tensor  # of birkhoff only: the permutations, (S!, S²)

    def __init__(
        self,
        dim: int,
        num_streams: int = 4,
        sinkhorn_iters: int = 20,
        sinkhorn_tau: float = 1.0,
        residual: str = "sinkhorn",
        alpha: float = 0.01,
        diagonal_bias: float = 5.0,
        eps: float = 1e-6,
        index: tuple[int, int] = (0, 0),
    ):
        super().__init__()
        arguments = (num_streams, sinkhorn_iters, sinkhorn_tau, residual, alpha, diagonal_bias)
        check_mhc_hyperparameters({**MHC_DEFAULTS, **dict(zip(MHC_DEFAULTS, arguments, strict=False))})
        self.dim, self.num_streams, self.residual, self.index, self.eps = dim, num_streams, residual, index, eps
        self.sinkhorn_iters, self.sinkhorn_tau = sinkhorn_iters, sinkhorn_tau
        self.alpha, self.diagonal_bias = alpha, diagonal_bias
        routes = num_streams**2
        if residual == MHC_BIRKHOFF:
            self.register_buffer("basis", permutation_basis(num_streams), persistent=False)
            routes = math.factorial(num_streams)
        self.sizes = (num_streams, num_streams, routes)
        self.register_buffer("part", self._parts(), persistent=False)
        # Trainer's weight decay leaves out every name with "bias" in it: those that hold no matrix have it.
        self.phi = nn.Parameter(torch.empty(sum(self.sizes), num_streams * dim, dtype=_own_dtype()))
        self.bias = nn.Parameter(torch.empty(sum(self.sizes), dtype=_own_dtype()))
        self.scale_bias = nn.Parameter(torch.empty(3, dtype=_own_dtype()))
        self.m3po_init_weights()

    @torch.no_grad()
    def m3po_init_weights(self, model: Any = None) -> None:
        """The start; what was loaded from a checkpoint is left alone."""
        init.copy_(self.part, self._parts().to(self.part.device))
        if self.residual == MHC_BIRKHOFF:
            init.copy_(self.basis, permutation_basis(self.num_streams).to(self.basis.device))
        init.zeros_(self.phi)
        init.constant_(self.scale_bias, self.alpha)
        init.copy_(self.bias, self.start_bias().to(self.bias))

    def start_bias(self) -> torch.Tensor:
        """(2S + routes) float64: b at the start. Both kinds of `residual` give the same H_res (sinkhorn at tau=1)."""
        streams = self.num_streams
        if self.residual == MHC_BIRKHOFF:  # each other permutation weighs so much that an off-diagonal entry is right
            other = 1 / (math.exp(self.diagonal_bias) + streams - 1) / math.factorial(streams - 1)
            identity = math.log((1 - (self.sizes[2] - 1) * other) / other)
            routes = torch.tensor([identity, *[0.0] * (self.sizes[2] - 1)], dtype=torch.float64)
        else:
            routes = (self.diagonal_bias * torch.eye(streams, dtype=torch.float64)).flatten()
        return torch.cat([torch.zeros(2 * streams, dtype=torch.float64), routes])

    def get_matrices(
        self, x: torch.Tensor, gate: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """H_res (B, T, S, S), H_pre (B, T, S) and H_post (B, T, S), float32, or float64 from float64.

        Args:
            x: the streams (B, T, S, H), any floating dtype.
            gate: (1 or B, L, 2) as `routing_gate.as_gate` makes it, or None, which is 1.

        Raises:
            ValueError: the streams are not of this module's S and H.
        """
        if x.shape[-2:] != (self.num_streams, self.dim):
            raise ValueError(
                f"streams of shape {tuple(x.shape)} for mhc_num_streams={self.num_streams} and hidden size {self.dim}: "
                "give (B, T, S, H)."
            )
        with torch.autocast(x.device.type, enabled=False):
            normed = _project(x.flatten(-2), self.phi, self.eps)
            logits = torch.addcmul(wide(self.bias), normed, wide(self.scale_bias).index_select(0, self.part))
            pre, post, routes = logits.split(self.sizes, dim=-1)
            return self._route(routes, gate), torch.sigmoid(pre + self._even()), 2 * torch.sigmoid(post)

    def _parts(self) -> torch.Tensor:
        return torch.tensor([part for part, size in enumerate(self.sizes) for _ in range(size)])

    def _even(self) -> float:
        """What a sigmoid takes to 1/S."""
        return -math.log(self.num_streams - 1) if self.num_streams > 1 else SATURATED

    def _route(self, logits: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        """H_res (B, T, S, S) of its logits, between the identity and itself by the gate."""
        if self.residual == MHC_BIRKHOFF:
            mixing = birkhoff(logits, self.basis)
        else:
            square = logits.unflatten(-1, (self.num_streams, self.num_streams))
            mixing = sinkhorn(square, self.sinkhorn_iters, self.sinkhorn_tau)
        if gate is None:
            return mixing
        share = gate[:, self.index[0], self.index[1], None, None, None].to(mixing.dtype)
        return (1 - share) * torch.eye(self.num_streams, dtype=mixing.dtype, device=mixing.device) + share * mixing


def _project(flat: torch.Tensor, phi: torch.Tensor, eps: float) -> torch.Tensor:
    """φ x / ρ for x (..., S H) of any dtype, in float32 or float64: (..., rows)."""
    if torch.is_grad_enabled():
        return _Projection.apply(flat, phi, eps)
    return _projected(flat, phi, eps)[0]


def _projected(flat: torch.Tensor, phi: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The projection, and 1 / ρ (..., 1). The norm comes after the product: it is a number for each position."""
    flat = wide(flat)
    mean_square = torch.linalg.vector_norm(flat, dim=-1, keepdim=True).square() / flat.shape[-1]
    scale = torch.rsqrt(mean_square + eps)
    return nn.functional.linear(flat, phi.to(flat.dtype)) * scale, scale


class _Projection(torch.autograd.Function):
    """`_project`, which keeps the streams in their own dtype and makes no normed copy of them, forward or backward."""

    @staticmethod
    def forward(ctx: Any, flat: torch.Tensor, phi: torch.Tensor, eps: float) -> torch.Tensor:
        projected, scale = _projected(flat, phi, eps)
        ctx.save_for_backward(flat, phi, projected, scale)
        return projected

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        flat, phi, projected, scale = ctx.saved_tensors
        values, scaled = wide(flat), gradient * scale
        to_phi = scaled.flatten(0, -2).T @ values.flatten(0, -2)
        pull = (gradient * projected).sum(-1, keepdim=True) * scale.square() / -values.shape[-1]  # through 1 / ρ
        to_flat = torch.addcmul(scaled @ phi.to(values.dtype), pull, values)
        return to_flat.to(flat.dtype), to_phi.to(phi.dtype), None


class StreamOffsets(nn.Module):
    """What tells the streams apart where they begin: x_s = x + RMS(x) o_s.

    Args:
        dim: H.
        num_streams: S.
        size: RMS of the offsets over that of the state, at the start.
    """

    def __init__(self, dim: int, num_streams: int, size: float):
        super().__init__()
        self.size = size
        self.offset_bias = nn.Parameter(torch.empty(num_streams, dim, dtype=_own_dtype()))
        self.m3po_init_weights()

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(B, T, H) -> the streams (B, T, S, H), in the same dtype."""
        with torch.autocast(states.device.type, enabled=False):
            one = wide(states)
            scale = one.square().mean(-1, keepdim=True).add(1e-12).sqrt()
            streams = one.unsqueeze(-2) + scale.unsqueeze(-1) * self.offset_bias.to(one.dtype)
            return streams.to(states.dtype)

    @torch.no_grad()
    def m3po_init_weights(self, model: Any = None) -> None:
        """The start, the same in every model: in each unit as many streams above as below, by the same amount."""
        streams, dim = self.offset_bias.shape
        signs = torch.tensor([(-1.0) ** s for s in range(streams - streams % 2)] + [0.0] * (streams % 2))
        order = torch.rand(streams, dim, generator=torch.Generator().manual_seed(_OFFSET_SEED)).argsort(0)
        init.copy_(self.offset_bias, (self.size * signs[order]).to(self.offset_bias.device))


def _own_dtype() -> torch.dtype:
    """float32; float64 where a model is made in float64."""
    return torch.promote_types(torch.float32, torch.get_default_dtype())


def add_hyper_connections(layer: Any, config: Any, layer_idx: int) -> None:
    """Hook of a decoder layer's `__init__`: makes `mhc_attn` and `mhc_mlp` if the configuration has them on."""
    if not has_hyper_connections(config):
        return
    for sublayer, name in enumerate(MHC_MODULES[:2]):
        mixer = DynamicMHC(
            config.hidden_size,
            num_streams=config.mhc_num_streams,
            sinkhorn_iters=config.mhc_sinkhorn_iters,
            sinkhorn_tau=config.mhc_sinkhorn_tau,
            residual=config.mhc_residual,
            alpha=config.mhc_alpha,
            diagonal_bias=config.mhc_diagonal_bias,
            eps=config.rms_norm_eps,
            index=(layer_idx, sublayer),
        )
        setattr(layer, name, mixer)


def add_streams(model: Any) -> None:
    """Hook of a base model's `__init__`: makes `mhc_streams` if the configuration has them on."""
    if has_hyper_connections(model):
        config = model.config
        model.mhc_streams = StreamOffsets(config.hidden_size, config.mhc_num_streams, config.mhc_stream_offset)


def expand_streams(model: Any, states: torch.Tensor, mhc_gate: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hook before the layers: the streams (B, T, S, H), and the gate for all layers (1 or B, L, 2) or None.

    Where hyper-connections are off, the very states (B, T, H) that came in, and None.

    Raises:
        ValueError: a gate on a model without hyper-connections, or one that breaks its rule (`routing_gate.as_gate`).
    """
    if not has_hyper_connections(model):
        if mhc_gate is not None:
            raise ValueError(
                f"mhc_gate does nothing on a {type(model).__name__} without hyper-connections: set mhc_enabled=True in "
                "its configuration, or leave it out."
            )
        return states, None
    return model.mhc_streams(states), forward_gate(model, mhc_gate, states)


def reduce_streams(model: Any, states: torch.Tensor) -> torch.Tensor:
    """Hook behind the layers: the mean of the streams, (B, T, H); the very tensor where hyper-connections are off."""
    return states.mean(-2) if has_hyper_connections(model) else states


def read_streams(
    layer: Any, name: str, streams: torch.Tensor, gate: torch.Tensor | None
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """Hook before a sublayer: its input Σ_i H_pre[i] x_i, (B, T, H), and what `write_streams` needs.

    Where the layer has no module `name`, the very tensor that came in, and None.
    """
    mixer = getattr(layer, name, None)
    if mixer is None:
        return streams, None
    h_res, h_pre, h_post = mixer.get_matrices(streams, gate)
    with torch.autocast(streams.device.type, enabled=False):
        read = (h_pre.to(streams.dtype).unsqueeze(-2) @ streams).squeeze(-2)
    return read, (h_res, h_post)


def write_streams(
    streams: torch.Tensor, output: torch.Tensor, mix: tuple[torch.Tensor, torch.Tensor] | None
) -> torch.Tensor:
    """Hook in place of a residual add: Σ_i H_res[i, j] x_i + H_post[j] y, (B, T, S, H); x + y where `mix` is None.

    Args:
        streams: x, as they came into the sublayer.
        output: y (B, T, H), of the sublayer.
        mix: of `read_streams`.
    """
    if mix is None:
        return streams + output
    h_res, h_post = (matrix.to(streams.dtype) for matrix in mix)
    with torch.autocast(streams.device.type, enabled=False):
        mixed = h_res.transpose(-1, -2) @ streams
        return torch.addcmul(mixed, h_post.unsqueeze(-1), output.to(streams.dtype).unsqueeze(-2))


def parameters_without_decay(model: Any) -> list[str]:
    """The parameters of the hyper-connections that weight decay must leave alone: biases, scales and offsets.

    Trainer leaves them out by their names; this is for other optimizers.
    """
    return [
        name
        for name, value in model.named_parameters()
        if any(part in MHC_MODULES for part in name.split(".")) and name.rpartition(".")[2] != "phi"
    ]
