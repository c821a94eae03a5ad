# SPDX-License-Identifier: Apache-2.0
"""Report on a study: ``bash scripts/analyze_experiment.sh DIR [--output_dir DIR]``.

DIR is the folder that scripts/run_experiment.sh made, or a copy of its `study.json` and summaries (as `RUN.json`).
It writes `report.md`, `report.html`, which has its figures inside, and `figures/`, into DIR unless told otherwise. Runs
that are none of the study's are refused by name; where some are missing, the report says that it is an interim one.
Exit codes: 0 reported, 2 a wrong input.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from m3po_lab.command_line.commands import shown_command
from m3po_lab.command_line.entry import start
from m3po_lab.command_line.plain_parser import OneLineFlags
from m3po_lab.command_line.quiet import silence_known_noise
from m3po_lab.core.errors import UserError, exit_code
from m3po_lab.core.files import check_writable

ANALYZE = "scripts/analyze_experiment.sh"


def main(argv: Sequence[str] | None = None) -> int:
    """Report as command-line words say (those of the process by default); returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    silence_known_noise()
    parser = OneLineFlags(
        usage=f"bash {ANALYZE} DIR [--output_dir DIR]",
        description="Report on the finished runs of a study, as Markdown and as one HTML file.",
    )
    parser.add_argument("folder", type=Path, help="the folder of a study, or a copy of its summaries")
    parser.add_argument("--output_dir", type=Path, help="the folder of the report (default: that of the study)")

    def report() -> None:
        options = parser.parse_args(words)
        folder = options.output_dir or options.folder
        check_writable(folder)
        from m3po_lab.study.analysis import Analysis
        from m3po_lab.study.plan import check_study, finished_runs
        from m3po_lab.study.report import report_files, write_report

        stored, runs, missing = finished_runs(options.folder)
        if not runs:
            raise UserError(f"{options.folder} has no finished run yet.")
        content = {name: value for name, value in stored["study"].items() if name != "base_content"}
        analysis = Analysis(check_study(str(options.folder), content), runs)
        command = shown_command(ANALYZE, words)
        answer = write_report(analysis, stored, missing, options.folder, folder, command)
        print("\n".join([*answer, "", f"written to {report_files(folder)}"]))

    return exit_code(report, "Stopped.")


if __name__ == "__main__":
    start(main)
