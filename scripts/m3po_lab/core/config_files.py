# SPDX-License-Identifier: Apache-2.0
"""The YAML file of a command: which word of the command line names it, and where it lies. Nothing large is imported."""

from pathlib import Path

from m3po_lab.core.errors import PROJECT_ROOT, UserError
from m3po_lab.core.user_files import read_text

DEFAULT_CONFIG = "configs/demo.yaml"
OF_OTHER_COMMANDS = ("accelerate", "eval")  # folders in configs/ whose files are no runs
OF_PRETRAINING = "mhc_"  # how the files of scripts/train_mhc.sh begin
OF_CONTROLLER = "controller_"  # and those of scripts/train_controller.sh
YAML_ENDINGS = (".yaml", ".yml")


def find_config(path: str, folder: str = "configs", begins: str = "") -> Path:
    """The YAML file at a path, seen from the current folder or else from the project's root.

    Args:
        path: relative or absolute.
        folder: has the known ones, which an error names.
        begins: how their names begin; empty leaves out those of pretraining and of controllers.

    Raises:
        UserError: neither is a file, or it is not UTF-8.
    """
    places = (Path(path), PROJECT_ROOT / path)
    for candidate in places:
        if candidate.is_file():
            read_text(candidate)  # what reads it later would not say where it is wrong
            return candidate.resolve()
    files = [
        file.relative_to(PROJECT_ROOT / folder)
        for file in (PROJECT_ROOT / folder).rglob("*.yaml")
        if file.name.startswith(begins) and (begins or not file.name.startswith((OF_PRETRAINING, OF_CONTROLLER)))
    ]
    runs = [file for file in files if file.parts[0] not in OF_OTHER_COMMANDS]
    if folder == "configs":
        runs = [file for file in runs if not is_study(PROJECT_ROOT / folder / file)]
    known = sorted(f"{folder}/{file.as_posix()}" for file in runs)
    what = "is a folder" if any(place.is_dir() for place in places) else "does not exist"
    raise UserError(f"Config file {path} {what}. Give the path of a YAML file; the project has {', '.join(known)}.")


def is_study(file: Path) -> bool:
    """Whether a YAML file is the plan of a study (scripts/run_experiment.sh) and not a run."""
    return "\nvariants:" in file.read_text(encoding="utf-8")


def split_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """Take the YAML out of the arguments: the value of ``--config``, the first word, or a later one that ends in .yaml.

    Such a word right behind a flag is the value of that flag.

    Raises:
        UserError: there are two, or ``--config`` has no value.
    """
    files: list[str] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        of_a_flag = bool(rest) and rest[-1].startswith("--") and "=" not in rest[-1]
        if flag == "--config":
            files.append(value if equals else next(words, ""))
        elif not word.startswith("-") and not of_a_flag and (word.endswith(YAML_ENDINGS) or not (rest or files)):
            files.append(word)
        else:
            rest.append(word)
    if "" in files:
        raise UserError("--config needs the path of a YAML file.")
    if len(files) > 1:
        raise UserError(f"{' and '.join(files)} are two YAML files: give one, and flags for what differs from it.")
    return (files[0] if files else None), rest
