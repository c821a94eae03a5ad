# SPDX-License-Identifier: Apache-2.0
"""An import path of the prototype notes; the code is in `transformers.m3po.gating.factory`."""

from ....m3po.gating.factory import *  # noqa: F403
