# SPDX-License-Identifier: Apache-2.0
"""What a command is to its user: its start, its flags' rules, the commands it shows."""
