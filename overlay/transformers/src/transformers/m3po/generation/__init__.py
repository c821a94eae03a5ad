# SPDX-License-Identifier: Apache-2.0
"""One rollout inside `_sample`: its state, what it records at each step, its checks and its output."""
