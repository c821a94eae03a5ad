# SPDX-License-Identifier: Apache-2.0
"""One token a row by inverting its distribution function (Devroye, 1986, Non-Uniform Random Variate Generation, III.2).

`torch.multinomial` draws an exponential number for each token of the vocabulary, which on a CPU takes longer than all
else that a decode step does beside the model.
"""

from __future__ import annotations

import torch


def invert_cdf(probs: torch.Tensor) -> torch.Tensor:
    """Draws the first token at which the running sum of the probabilities exceeds u times their sum, u uniform.

    Args:
        probs: (B, V) float32, at least 0; a row need not sum to 1 exactly. Rows that are not finite give some token.

    Returns:
        (B, 1) long. A token of probability 0 is never drawn.
    """
    sums = probs.cumsum(-1, dtype=torch.float64)  # in float32 the sum of a large vocabulary drops small probabilities
    total = sums[:, -1:]
    drawn = torch.rand(total.shape, dtype=torch.float64, device=probs.device) * total
    # The largest double below 1 times the total could round up to it.
    drawn = torch.minimum(drawn, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, drawn, right=True).clamp_max(probs.shape[-1] - 1)
