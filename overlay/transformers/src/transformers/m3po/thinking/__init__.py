# SPDX-License-Identifier: Apache-2.0
"""Thinking inputs: who listens to whom, soft thoughts, bags, and the one function that mixes them into the input."""
