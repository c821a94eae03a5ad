# SPDX-License-Identifier: Apache-2.0
"""The import path of seed 3 (E29); the code is in `transformers.m3po.gating.base`."""

from ....m3po.gating.base import *  # noqa: F403
