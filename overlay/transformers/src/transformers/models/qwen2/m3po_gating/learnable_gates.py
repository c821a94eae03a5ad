# SPDX-License-Identifier: Apache-2.0
"""The import path of seed 3 (E29); the code is in `transformers.m3po.gating.learnable_gates`."""

from ....m3po.gating.learnable_gates import *  # noqa: F403
