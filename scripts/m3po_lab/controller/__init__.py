# SPDX-License-Identifier: Apache-2.0
"""A controller of the routing gates of hyper-connections: which gate for which problem, learned by reinforcement."""
