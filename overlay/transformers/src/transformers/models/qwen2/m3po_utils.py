# SPDX-License-Identifier: Apache-2.0
"""An import path of the prototype notes; the code is in `transformers.m3po`."""

from ...m3po import apply_cross_path_interaction, apply_m3po_to_logits, generate_with_m3po  # noqa: F401
