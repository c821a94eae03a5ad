# SPDX-License-Identifier: Apache-2.0
"""Per-token log-probabilities of a language-model head in plain torch, for machines without a GPU or without Triton.

`TorchChunkedLogProbFunction` takes the arguments of TRL's Triton kernel, `trl.kernels.chunked_logprob
.ChunkedLogProbFunction`, and returns its outputs. Like the kernel it never holds all logits: one tile of them (at most
`TOKEN_CHUNK_SIZE` tokens, at most `TILE_ELEMENTS` numbers) is alive at a time, the forward keeps none of them, and the
backward computes each tile again.

It departs from the kernel in four points, each of which changes cost or rounding and never the function computed:

- tiles are small enough for a processor's cache, so `chunk_size` is an upper bound on their width;
- tokens whose incoming gradient is zero (zero advantage, clipped ratio) are left out of the backward;
- the logits gradient stays in float32 where the kernel rounds it to the tile's dtype before the matrix products; only
  the head's gradient, when a single matrix product makes it, uses the tile's dtype, so that it is rounded once;
- float64 inputs are computed in float64 (the kernel: float32), which is what gradient checks need.

This file is not in `trl.kernels`, because importing that package needs Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

# Per-token outputs besides the log-probabilities, in the order in which they are returned
OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# Tokens per tile, and logits per tile (32 MiB in float32)
TOKEN_CHUNK_SIZE = 4096
TILE_ELEMENTS = 8 * 1024 * 1024


class _Head(NamedTuple):
    """What turns hidden states into logits, besides the tensors."""

    dtype: torch.dtype  # of the projection
    chunk_size: int
    logit_scale: float
    softcap: float | None
    inv_temperature: float


class _Tokens(NamedTuple):
    """What the backward needs of each token besides its hidden state: (n,) each."""

    targets: torch.Tensor
    log_z: torch.Tensor
    grad_log_probs: torch.Tensor
    entropy: torch.Tensor | None
    grad_entropy: torch.Tensor | None

    def take(self, index: torch.Tensor | slice) -> _Tokens:
        optional = (None if x is None else x[index] for x in (self.entropy, self.grad_entropy))
        return _Tokens(self.targets[index], self.log_z[index], self.grad_log_probs[index], *optional)


def scorer(kernel: type[torch.autograd.Function] | None, device: torch.device) -> type[torch.autograd.Function]:
    """Return the function that scores tokens whose hidden states and head lie on `device`.

    Args:
        kernel: TRL's Triton function, or None where Triton is not installed.
        device: the device.

    Returns:
        `kernel` itself on CUDA and XPU devices if there is one, else `TorchChunkedLogProbFunction`.
    """
    if kernel is not None and device.type in ("cuda", "xpu"):
        return kernel
    return TorchChunkedLogProbFunction


class TorchChunkedLogProbFunction(torch.autograd.Function):
    """Log-probabilities of `targets` under `softmax(transform(hidden @ weight.T + bias))`, one tile at a time.

    The transform of a logit y is `softcap * tanh(logit_scale * y / softcap) / temperature`, without a softcap
    `logit_scale * y / temperature`. Source: `ChunkedLogProbFunction` of TRL 1.15, with its arguments and outputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OPTIONAL_OUTPUTS,
    ) -> tuple[torch.Tensor | None, ...]:
        """Score N tokens.

        Args:
            ctx: the autograd context.
            hidden: (N, H) final hidden states, any floating dtype. Under autocast the projection has autocast's dtype.
            weight: (V, H) head.
            bias: (V,) or None.
            targets: (N,) token ids, int64 or int32. The caller leaves ignored labels out, as TRL does, so that they
                cost nothing; a target outside [0, V) scores against a logit of 0, as in the kernel.
            temperature: divides the logits; above 0.
            chunk_size: largest number of vocabulary entries per tile.
            final_logit_softcapping: bound of the logits, or None.
            logit_scale: factor of the logits before the softcap.
            outputs: which of `OPTIONAL_OUTPUTS` to compute.

        Returns:
            (log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1), each (N,), float32 (float64 for float64
            projections), in nats; `is_top1` bool; None where not asked for. The first two are differentiable.
        """
        ctx.set_materialize_grads(False)  # an entropy that is only logged costs no backward
        device_type = hidden.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype
        ctx.head = _Head(dtype, chunk_size, logit_scale, final_logit_softcapping, 1 / temperature)
        parts = [
            _score_rows(hidden[rows], weight, bias, targets[rows], ctx.head, outputs)
            for rows in _slices(max(len(hidden), 1), TOKEN_CHUNK_SIZE)
        ]
        log_z, log_probs, entropy, *rest = (None if x[0] is None else torch.cat(x) for x in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, bias, targets, log_z, entropy)
        ctx.mark_non_differentiable(*(x for x in rest if x is not None))
        return log_probs, entropy, *rest

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_log_probs: torch.Tensor | None, grad_entropy: torch.Tensor | None, *_: None
    ) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of hidden, weight and bias that are needed, each in its tensor's dtype."""
        # `trl.trainer.utils` imports this module, so import from it at call time
        from .utils import maybe_gather_lm_head_ctx

        hidden, weight, bias, targets, log_z, entropy = ctx.saved_tensors
        grad_log_probs = torch.zeros_like(log_z) if grad_log_probs is None else grad_log_probs.to(log_z.dtype)
        grad_entropy = None if grad_entropy is None else grad_entropy.to(log_z.dtype)
        active = grad_log_probs != 0 if grad_entropy is None else (grad_log_probs != 0) | (grad_entropy != 0)
        tokens = _Tokens(targets, log_z, grad_log_probs, entropy, grad_entropy).take(active)
        with maybe_gather_lm_head_ctx(weight, bias):
            grad_hidden, grad_weight, grad_bias = _backward_rows(
                hidden[active], weight, bias, tokens, ctx.head, ctx.needs_input_grad[:3]
            )
        if grad_hidden is not None:
            grad_hidden = torch.zeros_like(hidden).masked_scatter_(active[:, None], grad_hidden.to(hidden.dtype))
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        grad_bias = None if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, *[None] * 6


def _slices(length: int, step: int) -> list[slice]:
    """Cut range(length) into slices of at most `step`."""
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _tiles(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, head: _Head
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yield (columns, projection, scratch) for one tile (n, width) after the other, in float32 or float64.

    The caller may overwrite both tensors and is done with them when it asks for the next tile: all share two buffers.
    """
    n = len(hidden)
    hidden = hidden.to(head.dtype)
    width = max(1, min(head.chunk_size, len(weight), TILE_ELEMENTS // max(n, 1)))
    dtype = torch.promote_types(head.dtype, torch.float32)
    buffers = [hidden.new_empty(n * width, dtype=dtype) for dtype in (head.dtype, dtype, dtype)]
    for cols in _slices(len(weight), width):
        shape = (n, cols.stop - cols.start)
        product, tile, scratch = (buffer[: shape[0] * shape[1]].view(shape) for buffer in buffers)
        torch.mm(hidden, weight[cols].to(head.dtype).t(), out=product)
        if bias is not None:
            product.add_(bias[cols].to(head.dtype))
        yield cols, tile.copy_(product), scratch


def _transform(tile: torch.Tensor, head: _Head) -> torch.Tensor:
    """Turn projections (n, width) into logits, in place."""
    if head.softcap is None:
        return tile.mul_(head.logit_scale * head.inv_temperature)
    return tile.mul_(head.logit_scale / head.softcap).tanh_().mul_(head.softcap * head.inv_temperature)


def _locate(targets: torch.Tensor, cols: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (rows, local): which of the targets (n,) lie in the columns, and at which column of the tile."""
    rows = ((targets >= cols.start) & (targets < cols.stop)).nonzero().squeeze(1)
    return rows, targets[rows].long() - cols.start


def _score_rows(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    head: _Head,
    outputs: tuple[str, ...],
) -> tuple[torch.Tensor | None, ...]:
    """Return (log_z, log_probs, *OPTIONAL_OUTPUTS) of n tokens, folding tile after tile into running sums.

    The sums are relative to the running maximum, as in the online softmax (Milakov and Gimelshein, 2018).
    """
    dtype = torch.promote_types(head.dtype, torch.float32)
    maximum = torch.full((len(hidden),), float("-inf"), dtype=dtype, device=hidden.device)
    target_logit, total, total_z, total_sq, sum_z = (torch.zeros_like(maximum) for _ in range(5))
    top = torch.full_like(targets, -1)
    for cols, tile, scratch in _tiles(hidden, weight, bias, head):
        z = _transform(tile, head)
        rows, local = _locate(targets, cols)
        target_logit[rows] = z[rows, local]
        if "mean_logits" in outputs:
            sum_z += z.sum(1)
        if "is_top1" in outputs:  # of equal logits the first one is the top, as for argmax
            tile_max, arg = z.max(1)
            top = torch.where(tile_max > maximum, arg.to(top.dtype) + cols.start, top)
        else:
            tile_max = z.amax(1)
        new_maximum = torch.maximum(maximum, tile_max)
        rescale = (maximum - new_maximum).exp_()
        maximum = new_maximum
        e = torch.sub(z, maximum[:, None], out=scratch).exp_()
        total = total * rescale + e.sum(1)
        if "entropy" in outputs:
            total_z = total_z * rescale + z.mul_(e).sum(1)
        if "log_sum_sq_probs" in outputs:
            total_sq = total_sq * rescale.square() + e.square_().sum(1)
    log_z = maximum + total.log()
    optional = {
        "entropy": lambda: log_z - total_z / total,
        "log_sum_sq_probs": lambda: total_sq.log() - 2 * total.log(),
        "mean_logits": lambda: sum_z / len(weight),
        "is_top1": lambda: top == targets,
    }
    return log_z, target_logit - log_z, *(optional[name]() if name in outputs else None for name in OPTIONAL_OUTPUTS)


def _backward_rows(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tokens: _Tokens,
    head: _Head,
    needed: tuple[bool, ...],
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of hidden (n, H), weight and bias, None where not `needed`.

    Sums over tiles are kept in float32 (float64); a head's gradient that is no such sum has the head's own dtype.
    """
    dtype = torch.promote_types(head.dtype, torch.float32)
    once = len(hidden) <= TOKEN_CHUNK_SIZE and weight.dtype == head.dtype
    weight_dtype = weight.dtype if once else dtype
    grad_hidden = torch.zeros_like(hidden, dtype=dtype) if needed[0] else None
    grad_weight = torch.zeros_like(weight, dtype=weight_dtype) if needed[1] else None
    grad_bias = torch.zeros_like(bias, dtype=dtype) if bias is not None and needed[2] else None
    for rows in _slices(len(hidden), TOKEN_CHUNK_SIZE):
        hidden_rows = hidden[rows].to(head.dtype)
        for cols, tile, scratch in _tiles(hidden_rows, weight, bias, head):
            grad = _projection_grad(tile, scratch, cols, tokens.take(rows), head)
            if grad_hidden is not None:
                grad_hidden[rows].addmm_(grad, weight[cols].to(head.dtype).to(dtype))
            if grad_bias is not None:
                grad_bias[cols] += grad.sum(0)
            if grad_weight is not None:
                grad_weight[cols].addmm_(grad.to(weight_dtype).t(), hidden_rows.to(weight_dtype))
    return grad_hidden, grad_weight, grad_bias


def _projection_grad(
    tile: torch.Tensor, scratch: torch.Tensor, cols: slice, tokens: _Tokens, head: _Head
) -> torch.Tensor:
    """Return the loss's gradient with respect to a tile of projections (n, width), in `scratch`.

    With p the probabilities and S their entropy: d log p_t / dz_j = [j = t] - p_j and dS / dz_j = -p_j (log p_j + S).
    """
    scale = head.logit_scale * head.inv_temperature
    z = _transform(tile, head)
    slope = None if head.softcap is None else 1 - (z / (head.softcap * head.inv_temperature)).square_()
    log_p = z.sub_(tokens.log_z[:, None])
    grad = torch.exp(log_p, out=scratch)
    if tokens.entropy is None or tokens.grad_entropy is None:
        grad.mul_(tokens.grad_log_probs[:, None] * -scale)
    else:
        factor = log_p.add_(tokens.entropy[:, None]).mul_(tokens.grad_entropy[:, None])
        grad.mul_(factor.add_(tokens.grad_log_probs[:, None]).mul_(-scale))
    rows, local = _locate(tokens.targets, cols)
    grad[rows, local] += tokens.grad_log_probs[rows] * scale
    return grad if slope is None else grad.mul_(slope)
