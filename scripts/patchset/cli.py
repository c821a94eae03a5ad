# SPDX-License-Identifier: Apache-2.0
"""The command line. Exit status: 0 ok, 1 drift or conflict, 2 refused or wrong usage."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from patchset import apply, bundle, check, checkout, drift, export, git, pins, status, table, upgrade, wheels
from patchset.common import Refused, Stop, is_read_only, lock

LATEST = "latest"
COMMANDS = {
    "fetch": "download and verify the pinned wheels, commit the pristine trees in vendor/",
    "apply": "lay patches/ and overlay/ on the checkouts",
    "status": "say per upstream: missing, pristine, patched, edited, stale",
    "export": "write commits made in vendor/ back to patches/ and overlay/",
    "check": "prove patches/ and overlay/ from the wheels alone, in a temporary folder",
    "upgrade": "move the pin of one upstream to another release, by a rebase in vendor/",
    "bundle": "write dist/: complete diffs, and patched wheels with local versions",
    "compatibility": "write docs/compatibility.md: the series against the newest releases",
    "table": "print the whole difference to the upstreams as Markdown",
}


def parser() -> argparse.ArgumentParser:
    """The command-line parser; every command takes --root and --upstream."""
    top = argparse.ArgumentParser(prog="python -m patchset", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="command")
    for name, text in COMMANDS.items():
        one = commands.add_parser(name, help=text, description=text)
        one.add_argument("--root", type=Path, help="the project's folder (default: the nearest one with overlay.toml)")
        one.add_argument("--upstream", action="append", metavar="NAME", help="only this upstream (repeatable)")
        if name == "apply":
            one.add_argument("--discard", action="store_true", help="drop edits in vendor/; a backup ref keeps them")
        if name == "export":
            one.add_argument("--check", action="store_true", help="compare only, write nothing")
        if name == "check":
            one.add_argument(
                "--against", metavar="VERSION", help="try the series on another release instead, or on 'latest'"
            )
        if name == "upgrade":
            one.add_argument("--version", required=True, help="the release to move to")
        if name == "status":
            one.add_argument("--json", action="store_true", help="print one JSON object")
    return top


def main(argv: list[str]) -> int:
    """Run one command; every expected fault is printed without a traceback."""
    options = parser().parse_args(argv)
    try:
        git.require()
        root = options.root.resolve() if options.root else pins.find_root(Path.cwd())
        ups = pins.load(root, options.upstream)
        with lock(root):
            checkout.recover(root)
            return _run(options, root, ups)
    except Stop as stop:
        print(stop, file=sys.stderr)
        return stop.code
    except OSError as error:
        if not is_read_only(error):
            raise
        print(f"{error.filename}: {error.strerror}; the checkout's owner has to call this", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the next call puts things right", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace, root: Path, ups: list[pins.Upstream]) -> int:
    if options.command == "status":
        statuses = {up.name: status.look(up) for up in ups}
        text = [line for name, one in statuses.items() for line in status.lines(name, one)]
        print(
            json.dumps({name: asdict(one) for name, one in statuses.items()}, indent=1)
            if options.json
            else "\n".join(text)
        )
        return 0 if all(one.ok for one in statuses.values()) else 1
    if options.command == "table":
        print(table.render(ups), end="")
        return 0
    version: str = getattr(options, "against", None) or getattr(options, "version", None) or ""
    if version and len(ups) != 1:
        raise Refused(f"{options.command}: {version} is a release of one upstream; name it with --upstream")
    if version == LATEST:
        version = wheels.newest(ups[0], 1)[0]
    lines = {
        "fetch": lambda: apply.fetch(ups),
        "apply": lambda: apply.apply(ups, discard=options.discard),
        "export": lambda: export.export(ups, check=options.check),
        "check": lambda: drift.against(ups[0], version) if version else check.check(root, ups),
        "upgrade": lambda: upgrade.upgrade(ups[0], version),
        "bundle": lambda: bundle.bundle(root, ups),
        "compatibility": lambda: drift.compatibility(root, ups),
    }[options.command]()
    print("\n".join(lines))
    return 0
