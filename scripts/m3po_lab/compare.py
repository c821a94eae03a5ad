# SPDX-License-Identifier: Apache-2.0
"""Compare finished runs over seeds: ``bash scripts/run.sh python -m m3po_lab.compare runs/*`` prints Markdown.

Exit codes: 0 compared, 2 a wrong input.
"""

from collections.abc import Sequence

from m3po_lab.command_line.entry import start
from m3po_lab.command_line.plain_parser import OneLineFlags
from m3po_lab.core.errors import exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison of the run folders in the command-line words; returns the exit code."""
    parser = OneLineFlags(description="Compare finished runs over seeds.")
    parser.add_argument("folders", nargs="+", help="run folders, or summary.json files")

    def compare() -> None:
        folders = parser.parse_args(argv).folders
        from m3po_lab.experiments.comparison import comparison

        print(comparison(folders))

    return exit_code(compare, "Stopped.")


if __name__ == "__main__":
    start(main)
