# SPDX-License-Identifier: Apache-2.0
"""Problems, their answers, and the rewards for them."""
