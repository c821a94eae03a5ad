# SPDX-License-Identifier: Apache-2.0
"""Studies: variants over seeds written down before their runs, and what they show."""
