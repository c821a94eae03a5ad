# SPDX-License-Identifier: Apache-2.0
"""Entry of `python -m patchset`; an old Python gets one clear line instead of an import error."""

import sys

if __name__ == "__main__":
    if sys.version_info < (3, 11):  # noqa: UP036
        print("patchset needs Python 3.11 or newer; this is " + sys.version.split()[0], file=sys.stderr)
        sys.exit(2)
    from patchset.cli import main

    sys.exit(main(sys.argv[1:]))
