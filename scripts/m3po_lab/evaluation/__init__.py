# SPDX-License-Identifier: Apache-2.0
"""Evaluation by lm-eval: the tasks, how a model decodes, what is left behind."""
