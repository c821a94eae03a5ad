# SPDX-License-Identifier: Apache-2.0
"""An import path of the prototype notes; the code is in `transformers.m3po.gating.base`."""

from ....m3po.gating.base import *  # noqa: F403
