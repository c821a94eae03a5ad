# SPDX-License-Identifier: Apache-2.0
"""Pretraining with and without hyper-connections."""
