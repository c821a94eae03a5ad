# SPDX-License-Identifier: Apache-2.0
"""The import path of seeds 3 and 4 (E29); the code is in `transformers.m3po.gating`."""

from ....m3po.gating import *  # noqa: F403
