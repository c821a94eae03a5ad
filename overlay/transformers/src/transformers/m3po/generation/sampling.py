# SPDX-License-Identifier: Apache-2.0
"""One token a row by inverting its distribution function (Devroye, 1986, Non-Uniform Random Variate Generation, III.2).

`torch.multinomial` draws an exponential number for each token of the vocabulary, which on a CPU takes longer than all
else that a decode step does beside the model.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

BLOCK = 256  # tokens; of a large vocabulary first a block is drawn and then a token in it


def invert_cdf(probs: torch.Tensor) -> torch.Tensor:
    """Draws a block of tokens by the sums of their probabilities, then a token of the block.

    Args:
        probs: (B, V) float32, at least 0; a row need not sum to 1 exactly. Rows that are not finite give some token.

    Returns:
        (B, 1) long. A token of probability 0 is never drawn.
    """
    blocks = F.pad(probs, (0, -probs.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    block = _draw(blocks.sum(-1))
    token = _draw(blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, BLOCK)).squeeze(1))
    return (block * BLOCK + token).clamp_max(probs.shape[-1] - 1)  # of NaN


def _draw(weights: torch.Tensor) -> torch.Tensor:
    """(B, 1) long: the first of the weights (B, n) at which their running sum exceeds u times the whole, u uniform."""
    sums = weights.cumsum(-1, dtype=torch.float64)
    total = sums[:, -1:]
    drawn = torch.rand(total.shape, dtype=torch.float64, device=weights.device) * total
    # The largest double below 1 times the total could round up to it.
    drawn = torch.minimum(drawn, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, drawn, right=True).clamp_max(weights.shape[-1] - 1)
