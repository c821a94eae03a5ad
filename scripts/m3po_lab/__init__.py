# SPDX-License-Identifier: Apache-2.0
"""Everything a training run needs and a user of the patched wheels does not: data, rewards, training, report.

Run it with ``bash scripts/train_grpo.sh``; ``python -m m3po_lab.train`` is the same without preparing the environment.
"""
