# SPDX-License-Identifier: Apache-2.0
"""overlay.toml: which wheel of which upstream, by hash, where it is unpacked and what a patch may touch."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from patchset.common import Refused, path_fault

TEXTS = ("version", "wheel", "sha256", "prefix", "license")
LISTS = ("allow", "imports")


@dataclass(frozen=True)
class Upstream:
    """One pinned upstream and where its parts lie in the project."""

    root: Path
    name: str
    version: str
    wheel: str
    sha256: str
    prefix: str  # folder of the checkout that takes the wheel's root: "src", or "." for the checkout itself
    license: str
    allow: tuple[str, ...]  # globs over checkout paths; a patch that touches anything else is refused
    imports: tuple[str, ...]  # packages that `check` imports after patching

    checkout: Path
    git_dir: Path
    patches: Path
    overlay: Path
    wheel_file: Path

    def work(self, what: str) -> Path:
        """A place beside the checkouts (same file system) for trees under construction."""
        return self.root / "vendor" / ".patchset" / f"{what}-{self.name}"

    def inside(self, wheel_path: str) -> str:
        """The checkout path of a file of the wheel."""
        return wheel_path if self.prefix == "." else f"{self.prefix}/{wheel_path}"


def find_root(start: Path) -> Path:
    """The nearest folder at or above `start` that holds overlay.toml."""
    for folder in (start, *start.parents):
        if (folder / "overlay.toml").is_file():
            return folder
    raise Refused(f"no overlay.toml in {start} or above it; call from the project's folder or give --root")


def release_number(root: Path) -> int:
    """The N of the local versions that `bundle` gives (`5.17.0+m3po.N`): `release` in overlay.toml."""
    number = tomllib.loads((root / "overlay.toml").read_text(encoding="utf-8")).get("release")
    if not isinstance(number, int) or number < 1:
        raise Refused("overlay.toml: `release` is the number of the bundle, 1 or more")
    return number


def load(root: Path, names: list[str] | None = None) -> list[Upstream]:
    """All pinned upstreams in file order, or those named; Refused with one line for anything malformed."""
    try:
        table = tomllib.loads((root / "overlay.toml").read_text(encoding="utf-8"))["upstream"]
    except FileNotFoundError:
        raise Refused(f"{root} has no overlay.toml") from None
    except (tomllib.TOMLDecodeError, KeyError) as error:
        raise Refused(f"overlay.toml cannot be read: {error}") from None
    upstreams = [_upstream(root, name, pin) for name, pin in table.items()]
    unknown = set(names or ()) - {up.name for up in upstreams}
    if unknown:
        raise Refused(
            f"--upstream {min(unknown)}: not in overlay.toml (it has {', '.join(up.name for up in upstreams)})"
        )
    return [up for up in upstreams if not names or up.name in names]


def _upstream(root: Path, name: str, pin: dict[str, object]) -> Upstream:
    where = f"overlay.toml [upstream.{name}]"
    wrong = set(pin) ^ {*TEXTS, *LISTS}
    if wrong:
        raise Refused(f"{where}: missing or unknown key {min(wrong)}")
    texts = {key: str(pin[key]) for key in TEXTS}
    lists = {key: tuple(str(item) for item in value) for key in LISTS if isinstance(value := pin[key], list)}
    if len(lists) != len(LISTS):
        raise Refused(f"{where}: {' and '.join(LISTS)} are lists of strings")
    if not re.fullmatch(r"[A-Za-z0-9_]+", name) or not re.fullmatch(r"[0-9a-f]{64}", texts["sha256"]):
        raise Refused(f"{where}: the name is letters, digits and '_', sha256 is 64 hexadecimal digits")
    if "/" in texts["wheel"] or not texts["wheel"].endswith(".whl"):
        raise Refused(f"{where}: wheel is the plain file name of a .whl")
    if texts["prefix"] != "." and (fault := path_fault(texts["prefix"])):
        raise Refused(f"{where}: prefix: {fault}")
    places = {"checkout": root / "vendor" / name, "git_dir": root / "vendor" / name / ".git"}
    places |= {"patches": root / "patches" / name, "overlay": root / "overlay" / name}
    places["wheel_file"] = root / ".cache" / "wheels" / texts["wheel"]
    return Upstream(root=root, name=name, **texts, **lists, **places)  # type: ignore[arg-type]
