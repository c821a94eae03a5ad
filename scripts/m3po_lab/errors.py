# SPDX-License-Identifier: Apache-2.0
"""A wrong input is one line; and the YAML file that an input names. Nothing large is imported here."""

import sys
from collections.abc import Callable
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parents[2]
DEFAULT_CONFIG = "configs/demo.yaml"
OF_OTHER_COMMANDS = ("accelerate", "eval")  # folders in configs/ whose files are no runs
OF_PRETRAINING = "mhc_"  # how the files of scripts/train_mhc.sh begin


class UserError(Exception):
    """A wrong input. Its text is one line that names the flag or file, the rule and what to do."""


def one_line(error: BaseException | str) -> str:
    """The first paragraph of an error's text on one line."""
    text = str(error).strip().split("\n\n")[0]
    return " ".join(text.split()) or type(error).__name__


def exit_code(action: Callable[[], int | None], when_stopped: str) -> int:
    """A command's: what `action` returns, None being 0; 2 for a wrong input, 130 for Ctrl-C, with a line for either."""
    try:
        return action() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{when_stopped}", file=sys.stderr)
        return 130


def find_config(given: str, folder: str = "configs", begins: str = "") -> Path:
    """The YAML file `given`, seen from the current folder or else from the project's root.

    Args:
        given: its path.
        folder: has the known ones, which an error names.
        begins: how their names begin; empty leaves out those of pretraining.

    Raises:
        UserError: when neither exists, or it is not UTF-8.
    """
    from m3po_lab.user_files import read_text

    for candidate in (Path(given), PROJECT_ROOT / given):
        if candidate.is_file():
            read_text(candidate)  # what reads it later would not say where it is wrong
            return candidate.resolve()
    files = [
        path.relative_to(PROJECT_ROOT / folder)
        for path in (PROJECT_ROOT / folder).rglob("*.yaml")
        if path.name.startswith(begins) and (begins or not path.name.startswith(OF_PRETRAINING))
    ]
    known = sorted(f"{folder}/{path.as_posix()}" for path in files if path.parts[0] not in OF_OTHER_COMMANDS)
    raise UserError(
        f"Config file {given} does not exist. Give the path of a YAML file; the project has {', '.join(known)}."
    )


def split_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """Take the YAML out of the arguments: the first positional one, or the value of ``--config``."""
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        return argv.pop(0), argv
    if "--config" in argv:
        at = argv.index("--config")
        if at + 1 == len(argv):
            raise UserError("--config needs the path of a YAML file.")
        given = argv[at + 1]
        del argv[at : at + 2]
        return given, argv
    return None, argv
