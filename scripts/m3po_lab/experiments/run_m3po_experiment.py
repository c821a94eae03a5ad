# SPDX-License-Identifier: Apache-2.0
"""Run a study: ``bash scripts/run_experiment.sh configs/studies/X.yaml [--dry-run] [--jobs N] [--output_dir DIR]``.

The YAML file says question, variants, seeds and measure before the first run; `configs/studies/` has examples, and
docs/experiments.md explains them. What is said first: how many seeds the smallest effect needs, and what the runs cost.
The same command goes on after a stop: finished runs stay, a stopped one resumes from its last checkpoint. A run in the
folder that is none of the study's is refused by its name. `bash scripts/analyze_experiment.sh DIR` reports.
Exit codes: 0 all runs are done, 2 a wrong input or a failing environment, 130 interrupted by Ctrl-C; else that of the
run that failed.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from m3po_lab.command_line.commands import shown_command
from m3po_lab.command_line.entry import start
from m3po_lab.command_line.plain_parser import OneLineFlags
from m3po_lab.command_line.quiet import silence_known_noise
from m3po_lab.core.config_files import find_config
from m3po_lab.core.errors import PROJECT_ROOT, UserError, exit_code
from m3po_lab.core.files import check_writable, shown_path

RUN, ANALYZE = "scripts/run_experiment.sh", "scripts/analyze_experiment.sh"


def parser() -> OneLineFlags:
    """The flags of a study."""
    flags = OneLineFlags(
        usage=f"bash {RUN} configs/studies/X.yaml [--dry-run] [--jobs N] [--output_dir DIR]",
        description="Run the variants of a study over its seeds; it goes on after a stop.",
    )
    flags.add_argument("study", help="the YAML file of the study")
    flags.add_argument("--dry-run", action="store_true", help="list the runs and what they cost, and train nothing")
    flags.add_argument(
        "--jobs",
        type=int,
        help="runs at once (default: one on each GPU; without a GPU one, with more each has its share of the cores)",
    )
    flags.add_argument("--output_dir", type=Path, help="the folder of the runs (default: runs/<name of the YAML>)")
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Run a study as command-line words say (those of the process by default); returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    silence_known_noise()

    def run() -> int:
        options = parser().parse_args(words)
        if options.jobs is not None and options.jobs < 1:
            raise UserError(f"--jobs {options.jobs}: it must be at least 1.")
        file = find_config(options.study, "configs/studies")
        from m3po_lab.study.plan import begin_study, open_study, read_study
        from m3po_lab.study.planner import plan_lines, read_pilots
        from m3po_lab.study.runs import cost_line, gpus, run_study

        folder = (options.output_dir or PROJECT_ROOT / "runs" / file.stem).resolve()
        study = read_study(file)
        pilots = read_pilots(study.pilots or [])
        check_writable(folder)
        runs, stored = open_study(study, folder)
        jobs = options.jobs or max(1, len(gpus()))
        print(f"study {stored['digest']}: {study.question}")
        print("\n".join([*plan_lines(study, pilots), cost_line(runs, folder, pilots, jobs)]), flush=True)
        if options.dry_run:
            print("\n".join(f"{run.name}  {' '.join(run.words[1:])}" for run in runs))
            return 0
        begin_study(folder, stored)
        code = run_study(runs, folder, jobs)
        if code == 0:
            print(f"all runs are done; report: {shown_command(ANALYZE, [shown_path(folder)])}")
        return code

    return exit_code(run, f"Stopped. Go on with: {shown_command(RUN, words)}")


if __name__ == "__main__":
    start(main)
