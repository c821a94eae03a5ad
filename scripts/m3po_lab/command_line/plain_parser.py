# SPDX-License-Identifier: Apache-2.0
"""The parser of the commands that train nothing themselves. Nothing large is imported."""

import argparse
from typing import Any, NoReturn

from m3po_lab.core.errors import UserError


class OneLineFlags(argparse.ArgumentParser):
    """A parser of a command's flags whose errors are one line and which takes no abbreviated flags."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (all flags: --help).")
