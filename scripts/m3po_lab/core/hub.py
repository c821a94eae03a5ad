# SPDX-License-Identifier: Apache-2.0
"""What the client of the Hugging Face Hub raises."""

import httpx

# Where the network, or the variables that tell of it, are not right.
HUB_ERRORS = (OSError, ValueError, RuntimeError, ImportError, httpx.HTTPError, httpx.InvalidURL)
