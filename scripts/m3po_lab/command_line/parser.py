# SPDX-License-Identifier: Apache-2.0
"""The flags of a training, from a YAML file and the command line.

TRL's `TrlParser` reads both; here is only what it lacks: one clear line instead of a usage page or a traceback, and no
abbreviated flags (a mistyped flag must not become another one).
"""

import dataclasses
import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from m3po_lab.command_line.flag_rules import check_values
from m3po_lab.core.config_files import YAML_ENDINGS
from m3po_lab.core.errors import UserError, one_line, short
from m3po_lab.core.processes import on_cpus

UNSET_OUTPUT_DIR = "trainer_output"  # what TrainingArguments fills in without an output_dir


class OneLineParser(TrlParser):
    """`TrlParser` whose errors are one line (`UserError`), which takes no abbreviated flags and checks their values."""

    def __init__(self, *groups: Any) -> None:
        super().__init__(list(groups), allow_abbrev=False)
        self.set_defaults(use_cpu=on_cpus())  # bf16 without a GPU needs it

    def error(self, message: str) -> NoReturn:
        hint = " Give the YAML file first." if any(ending in message for ending in YAML_ENDINGS) else ""
        raise UserError(f"{message} (all flags: --help).{hint}")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does; the values are checked before `TrlParser` makes dataclasses of them."""
        parsed = super().parse_known_args(args, namespace)
        check_values(vars(parsed[0]), self.dataclass_types)
        return parsed

    def flags(self) -> list[str]:
        """Every long flag, e.g. for a suggestion."""
        return [f"--{entry.name}" for group in self.dataclass_types for entry in dataclasses.fields(group)]


def parse_mapping(name: str, value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """A mapping, which a YAML file has as such and a command line as JSON or YAML text.

    Raises:
        UserError: when the text cannot be read or is not a mapping.
    """
    if isinstance(value, str):
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--{name} is not JSON or YAML: {one_line(error)}") from error
    if value is not None and not isinstance(value, dict):
        raise UserError(f"--{name} = {value!r}: it must be a mapping, e.g. '{{\"key\": 1}}'.")
    return value


@contextmanager
def one_line_errors(config_file: Path) -> Iterator[None]:
    """What argument groups and the reading of a YAML raise, as a `UserError`."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"{config_file.name} or a flag needs a package that is not installed ({short(error)}): leave the flag out, "
            "or install it with .venv/bin/pip."
        ) from error
    except (ValueError, TypeError, OSError, yaml.YAMLError) as error:
        raise UserError(f"{config_file.name} or a flag: {one_line(error)}") from error


def check_unknown(parser: OneLineParser, from_yaml: list[str], from_command_line: list[str], config_file: Path) -> None:
    """Refuse what no argument group knows, naming the nearest flag.

    Raises:
        UserError: for the first unknown word.
    """
    for word in from_yaml[::2] + from_command_line:
        flag = word.split("=")[0]
        where = f"{config_file}: unknown key '{flag[2:]}'" if word in from_yaml[::2] else f"Unknown argument {flag}"
        near = difflib.get_close_matches(flag, parser.flags(), n=1)
        raise UserError(f"{where}.{f' Did you mean {near[0]}?' if near else ''} All flags: --help.")


def read_keys(config_file: Path) -> list[str]:
    """The keys of a YAML file that has been parsed before."""
    return list(yaml.safe_load(config_file.read_text(encoding="utf-8")))
