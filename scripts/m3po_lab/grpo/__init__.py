# SPDX-License-Identifier: Apache-2.0
"""A training run by GRPO, from its arguments to its report."""
