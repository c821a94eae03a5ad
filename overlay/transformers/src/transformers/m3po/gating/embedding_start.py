# SPDX-License-Identifier: Apache-2.0
"""A space in which the embeddings of likely tokens are close to orthonormal: the start of a gating function."""

from __future__ import annotations

from collections.abc import Callable

import torch

CHUNK = 8192  # tokens at a time


@torch.no_grad()
def unit_whitening(
    embed_tokens: Callable[[torch.Tensor], torch.Tensor], vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whitens the embeddings, the likely ones first.

    Raw embeddings of a language model are far from orthogonal, so that (p E) · (q E) says little of p · q. They are
    whitened by their second moment, weighted with 1 / (id + 100)²: a byte-pair vocabulary is numbered by falling
    frequency, and of its V tokens no more than H can be orthogonal. Then each is given length 1.

    Args:
        embed_tokens: the input embedding: ids -> (..., H).
        vocab_size: V.

    Returns:
        whitening (H, H) float32: e becomes e @ whitening. lengths (V,) float32: of the whitened embeddings, by which
        they are still to be divided; of an embedding that is 0, as that of a padding token, a hundredth of the median.
    """
    ids = torch.arange(vocab_size, device=_device(embed_tokens))
    shares = (ids.double() + 100.0).pow(-2)
    shares /= shares.sum()
    moments = []
    for part in ids.split(CHUNK):
        rows = embed_tokens(part).double()
        moments.append(rows.T @ (rows * shares[part].unsqueeze(-1)))
    moment = torch.stack(moments).sum(0)
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    ridge = 1e-6 * moment.trace() / len(moment)  # a vocabulary smaller than H leaves directions empty
    factor = torch.linalg.cholesky(moment + ridge * identity)
    whitening = torch.linalg.solve_triangular(factor, identity, upper=False).T.float()
    lengths = torch.cat([(embed_tokens(part).float() @ whitening).norm(dim=-1) for part in ids.split(CHUNK)])
    return whitening.cpu(), lengths.clamp_min(1e-2 * lengths.median()).cpu()


def _device(embed_tokens: Callable[[torch.Tensor], torch.Tensor]) -> torch.device | None:
    weight = getattr(embed_tokens, "weight", None)
    return None if weight is None else weight.device
