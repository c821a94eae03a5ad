# SPDX-License-Identifier: Apache-2.0
"""A start at which hyper-connections cannot learn, put in on purpose to see it found out."""

from __future__ import annotations

import math
from typing import Any

import torch

BAD_TAU, BAD_BASE = 0.05, -8.0


def put_in_the_start_that_cannot_learn(mixer: Any) -> Any:
    """A sharp initialisation in a mixer's own parameters: -8 beside the diagonal, stream 0 read by every
    layer, projections drawn and not scaled. Its tau is an argument of the mixer."""
    streams = mixer.num_streams
    with torch.no_grad():
        base = torch.full((streams, streams), BAD_BASE).fill_diagonal_(0.0)
        pre = torch.full((streams,), BAD_BASE)
        pre[0] = 0.0
        mixer.bias.copy_(torch.cat([pre + math.log(streams - 1), torch.zeros(streams), base.flatten()]))
        mixer.phi.normal_(std=0.01)
        mixer.scale_bias.fill_(1.0)
    return mixer
