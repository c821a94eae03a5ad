# SPDX-License-Identifier: Apache-2.0
"""The overlay tool: fetches the pinned upstream wheels, lays our patches and new files on them, and writes edits back.

It needs Python 3.11, git 2.39 and nothing else, because it runs before the environment exists.
`python -m patchset --help` lists the commands; patches/README.md says how to work with them.
"""
