# SPDX-License-Identifier: Apache-2.0
"""The import path of seed 3 (E29); the code is in `transformers.m3po.gating.factory`."""

from ....m3po.gating.factory import *  # noqa: F403
