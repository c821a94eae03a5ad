# SPDX-License-Identifier: Apache-2.0
"""The import path that `hyper_connections.report` had before."""

from .hyper_connections.report import *  # noqa: F403
