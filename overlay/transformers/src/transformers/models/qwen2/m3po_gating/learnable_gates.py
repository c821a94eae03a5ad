# SPDX-License-Identifier: Apache-2.0
"""An import path of the prototype notes; the code is in `transformers.m3po.gating.learnable_gates`."""

from ....m3po.gating.learnable_gates import *  # noqa: F403
