# SPDX-License-Identifier: Apache-2.0
"""The pages: what is generated from the code, and the site that `make docs` builds of them."""
