# SPDX-License-Identifier: Apache-2.0
"""Hyper-connections (mHC): S residual streams in place of one, and the routing gate."""
