# SPDX-License-Identifier: Apache-2.0
"""Train modes over seeds and compare them: ``bash scripts/sweep.sh [X.yaml] [--modes ...] [--seeds ...] [--flag X]``.

Every run is a process of its own with the same command but for mode and seed, in `<output_dir>/<mode>-seed<seed>`.
The same command goes on after a stop: finished runs are kept, a run that was stopped is resumed from its last
checkpoint. At the end `comparison.md` has the table and each mode against the control.
Exit codes: 0 all runs are done and compared, 2 a wrong input, 130 interrupted by Ctrl-C; else that of the run that
failed.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def mode_words(mode: str) -> list[str]:
    """The flags of a mode, with ASLR where the name ends in `+aslr`."""
    name, *extra = mode.split("+")
    if extra not in ([], ["aslr"]):
        from m3po_lab.config import UserError

        raise UserError(f"--modes {mode} is unknown: give a mode, or a mode and +aslr.")
    return ["--mode", name, "--aslr_enabled", "true" if extra else "false"]


def run_words(config: Path, mode: str, seed: int, folder: Path, more: Sequence[str]) -> list[str]:
    """The command-line words of one run; it resumes where there is something to resume."""
    from m3po_lab.checkpoints import checkpoints, missing_part
    from m3po_lab.files import shown_path

    words = [shown_path(config), *more, *mode_words(mode), "--seed", str(seed), "--output_dir", shown_path(folder)]
    found = checkpoints(folder)
    if any(missing_part(path) is None for path in found):
        return [*words, "--resume_from_checkpoint", "true"]
    return [*words, "--overwrite", "true"] if found else words


def sweep(config: Path, modes: Sequence[str], seeds: Sequence[int], folder: Path, more: Sequence[str]) -> int:
    """Run what is not done and compare; returns an exit code."""
    from m3po_lab.compare import comparison
    from m3po_lab.files import shown_path, write_text

    pairs = [(mode, seed) for seed in seeds for mode in modes]
    places = {pair: folder / f"{pair[0]}-seed{pair[1]}" for pair in pairs}
    for number, (mode, seed) in enumerate(pairs, start=1):
        place = places[mode, seed]
        told = f"run {number} of {len(pairs)}: mode {mode}, seed {seed}"
        if (place / "summary.json").is_file():
            print(f"{told}: done before", flush=True)
            continue
        print(told, flush=True)
        command = [sys.executable, "-m", "m3po_lab.train", *run_words(config, mode, seed, place, more)]
        code = subprocess.run(command, check=False).returncode
        if code:
            print(f"error: {told} ended with exit code {code}; the same command goes on from there.", file=sys.stderr)
            return code
    text = comparison([str(place) for place in places.values()])
    write_text(folder / "comparison.md", text + "\n")
    print(f"\n{text}\n\nwritten to {shown_path(folder / 'comparison.md')}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Sweep as command-line words say (those of the process by default); returns the exit code."""
    from m3po_lab.config import PROJECT_ROOT, UserError, find_config, parse_run

    flags = argparse.ArgumentParser(
        prog="bash scripts/sweep.sh",
        description="Train modes over seeds and compare them.",
        epilog="Other flags go to every run, see bash scripts/train_grpo.sh --help.",
        allow_abbrev=False,
    )
    flags.add_argument("config", nargs="?", default="configs/demo_short.yaml", help="YAML of the runs")
    flags.add_argument(
        "--modes",
        nargs="+",
        default=["none", "m3po", "hrpo", "h3po"],
        help="modes, the control among them; with ASLR as none+aslr, m3po+aslr ... (default: the four without)",
    )
    flags.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    flags.add_argument("--output_dir", type=Path, help="folder of the runs (default: runs/sweep-<config>)")
    given, more = flags.parse_known_args(argv)
    try:
        config = find_config(given.config)
        for mode in given.modes:  # a wrong flag stops the sweep here and not after the first mode
            parse_run([str(config), *more, *mode_words(mode)])
        folder = given.output_dir or PROJECT_ROOT / "runs" / f"sweep-{config.stem}"
        return sweep(config, given.modes, given.seeds, folder.resolve(), more)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = shlex.join(["bash", "scripts/sweep.sh", *(sys.argv[1:] if argv is None else argv)])
        print(f"\nStopped. Go on with: {again}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
