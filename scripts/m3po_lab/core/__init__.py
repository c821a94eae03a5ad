# SPDX-License-Identifier: Apache-2.0
"""What every command uses: errors, files, identity of a run, statistics."""
