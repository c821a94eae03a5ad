# SPDX-License-Identifier: Apache-2.0
"""The environment in `.venv` (`make env`): pinned packages, and the patched checkouts of `vendor/` on its path.

Runs before anything is installed, so it needs the standard library and git only; `packages` has what is installed.

The extra `unsloth` (`make env EXTRA=unsloth`, or an NVIDIA GPU in the machine) installs what Unsloth depends on and
puts its two checkouts on the path too. The extra `docs` (`make docs`) installs what builds the site of the pages. An
environment that has an extra keeps it. The extra `vllm` installs vLLM's build for CPUs, and our plugin of it.

A stamp in `.venv`, written last, says for which inputs it was built. No stamp: an earlier call was interrupted, and
everything in `.venv` is built again (pip's cache keeps what was downloaded). The same inputs: nothing is done. The same
but for an extra that is asked for: only the extra is installed. The Python of a complete `.venv` is not changed for
another: that is what scripts/rebuild_env.sh is for.

A complete environment needs no write, so that one user can make it and another, who may not write there, use it.

Exit codes: 0 done or up to date, 1 failed, 2 refused, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from patchset import git
from patchset.common import Refused, Stop
from patchset.packages import (
    EXTRAS,
    Failed,
    call,
    check_compiler,
    check_packages,
    compile_imports,
    install,
    put_vendor_on_path,
    require_metadata,
    say,
)

ROOT = Path(__file__).resolve().parents[2]
MINIMUM_PYTHON = (3, 11)
STAMP = "m3po-environment.json"
NVIDIA_DRIVER = Path("/proc/driver/nvidia")


def check_tools(python: tuple[int, ...]) -> None:
    """Raise `Refused`, in one line, for a Python below 3.11 and for a git that is missing or below 2.39."""
    if python[:2] < MINIMUM_PYTHON:
        have = ".".join(map(str, python[:3]))
        raise Refused(
            f"Python {have} is too old: 3.11 or newer is needed; choose one with `make env PYTHON=python3.11`"
        )
    git.require()


def interpreter() -> str:
    """The Python that `.venv` is made from; the same one when called from inside a virtual environment made from it."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def inputs(root: Path, extras: Collection[str] = ()) -> dict[str, Any]:
    """What `.venv` depends on: `python`, `base` (it and the place; another needs a new `.venv`), `packages`, extras."""
    python = interpreter()
    base = f"Python {sys.version_info[0]}.{sys.version_info[1]} at {python} in {root}"
    digest = hashlib.sha256()
    for path in (root / "constraints.txt", root / "pyproject.toml", Path(__file__).with_name("packages.py")):
        digest.update(path.read_bytes() + b"\0")
    return {"python": python, "base": base, "packages": digest.hexdigest(), "extras": sorted(extras)}


def read_stamp(root: Path) -> dict[str, Any] | None:
    """The inputs for which `.venv` was completed, or None if it was not."""
    try:
        return {"extras": [], **json.loads((root / ".venv" / STAMP).read_text())}  # older stamps speak of none
    except (FileNotFoundError, ValueError):
        return None


def write_stamp(root: Path, built_for: dict[str, Any]) -> None:
    temporary = root / ".venv" / f"{STAMP}.new"
    temporary.write_text(json.dumps(built_for, indent=1))
    temporary.replace(root / ".venv" / STAMP)


def check_python(have: dict[str, Any] | None) -> None:
    """Raise `Refused`, in one line, where PYTHON asks for another Python than the one that made `.venv`."""
    was = have.get("python") if have else None
    if os.environ.get("PYTHON") and was and was != interpreter() and os.path.exists(was):
        asked = os.environ["PYTHON"]
        raise Refused(
            f".venv was made with {was}, and PYTHON={asked} is another one: leave PYTHON out, or make .venv anew: "
            f"PYTHON={asked} bash scripts/rebuild_env.sh"
        )


def check_extras(asked: Collection[str]) -> None:
    """Raise `Refused`, in one line, for an extra that does not exist."""
    unknown = sorted(set(asked) - set(EXTRAS))
    if unknown:
        raise Refused(f"there is no extra {' or '.join(unknown)}: choose from {', '.join(EXTRAS)}, or leave EXTRA out")
    if "vllm" in asked and has_nvidia_gpu():
        raise Refused("the extra vllm is vLLM's build for CPUs, and this machine has an NVIDIA GPU: leave EXTRA out")


def has_nvidia_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None or NVIDIA_DRIVER.exists()


def choose_extras(asked: Collection[str], have: dict[str, Any] | None, writable: bool = True) -> set[str]:
    """The extras asked for, those that `.venv` has, and, with a line that says so, `unsloth` where there is a GPU.

    Where the checkout cannot be written a GPU alone adds nothing: the image may have been built without one.
    """
    chosen = {*asked, *(set(have["extras"]) & set(EXTRAS) if have else ())}
    if "unsloth" not in chosen and has_nvidia_gpu() and not writable:
        say("this machine has an NVIDIA GPU; without the extra unsloth, which cannot be added: no right to write here")
    elif "unsloth" not in chosen and has_nvidia_gpu():
        say("this machine has an NVIDIA GPU: the extra unsloth is taken")
        chosen.add("unsloth")
    return chosen


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the checkout's environment lock (on constraints.txt); wait, with a line, while another call holds it.

    Child processes inherit it: a pip that outlives a killed `make env` keeps the next one waiting.
    """
    with (root / "constraints.txt").open() as handle:
        os.set_inheritable(handle.fileno(), True)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another `make env` of this checkout")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def patchset(*arguments: str) -> list[str]:
    return [interpreter(), "-m", "patchset", *arguments]


def states(root: Path) -> dict[str, str]:
    """Upstream -> its state by `patchset status`; raise `Refused` where that cannot be told."""
    environment = {**os.environ, "PYTHONPATH": str(root / "scripts")}
    done = subprocess.run(patchset("status", "--json"), cwd=root, env=environment, capture_output=True, text=True)
    try:
        states_by_name = {name: entry["state"] for name, entry in json.loads(done.stdout).items()}
    except ValueError:
        raise Refused(f"cannot tell whether vendor/ has edits of yours: {done.stderr.strip()}") from None
    unclear = [name for name, state in states_by_name.items() if state == "refused"]
    if unclear:
        raise Refused(f"cannot tell whether vendor/ has edits of yours in {', '.join(unclear)}: `make status` says why")
    return states_by_name


def edited(root: Path) -> list[str]:
    """The upstreams whose checkout has edits of the user."""
    return [name for name, state in states(root).items() if state == "edited"]


def lay_patches(root: Path) -> None:
    """`patchset apply`. Checkouts with edits are kept as they are, with one line: that is how a patch is worked on."""
    path = str(root / "scripts")
    code = call(patchset("apply"), root, PYTHONPATH=path)
    names = edited(root) if code == 2 else []
    if names:
        say(f"vendor/ has edits of yours in {', '.join(names)}: used as it is (`make status` shows them)")
        others = [f"--upstream={name}" for name in states(root) if name not in names]
        code = call(patchset("apply", *others), root, PYTHONPATH=path) if others else 0
    if code:
        raise (Refused if code == 2 else Failed)("the patches are not applied; the reason is above")


def prepare(root: Path, asked: Collection[str] = ()) -> None:
    """Lay the patches on and complete `.venv`; a no-op, without network, where both are up to date."""
    check_tools(tuple(sys.version_info[:3]))
    with locked(root):
        have = read_stamp(root)
        check_python(have)
        lay_patches(root)
        writable = os.access(root, os.W_OK)
        extras = choose_extras(asked, have, writable)
        needed = inputs(root, extras)
        if have == needed:
            say("up to date")
            return
        if not writable:
            why = ".venv is not complete, or its Python is not for you to run"
            raise Refused(f"{why}, and you may not write in {root}: its owner completes it (make env)")
        complete = have is not None and have["packages"] == needed["packages"] and have["base"] == needed["base"]
        if not complete:
            check_compiler()
        require_metadata(root, extras)
        (root / ".venv" / STAMP).unlink(missing_ok=True)
        if have is None or have["base"] != needed["base"]:
            if have is not None:
                say(f".venv was made with {have['base']}, which is not what is here now")
            say(f"making .venv with Python {sys.version.split()[0]}")
            if call([interpreter(), "-m", "venv", "--clear", ".venv"], root):
                raise Failed("Python could not make a virtual environment (on Debian and Ubuntu: install python3-venv)")
        put_vendor_on_path(root, extras)
        install(root, extras, everything=not complete)
        check_packages(root)
        compile_imports(root)
        write_stamp(root, needed)
        with_extras = f" with the extra {', '.join(needed['extras'])}" if extras else ""
        say(f"done: .venv is complete{with_extras}; vendor/ is on its path")


def remove(root: Path, discard_edits: bool) -> None:
    """Remove `.venv` and `vendor/`; raise `Refused` if `vendor/` has edits and `discard_edits` is False."""
    names = [] if discard_edits or not (root / "vendor").exists() else edited(root)
    if names:
        keep = "`make export-patches` saves what is committed there; --discard-edits drops all of it"
        raise Refused(f"vendor/ has edits of yours in {', '.join(names)}: {keep}")
    (root / ".venv" / STAMP).unlink(missing_ok=True)
    for folder in (".venv", "vendor"):
        if (root / folder).exists():
            say(f"removing {folder}")
            shutil.rmtree(root / folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `make env` and scripts/rebuild_env.sh. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="patchset.environment", description="Make or complete .venv and vendor/.")
    parser.add_argument("--rebuild", action="store_true", help="remove .venv and vendor/ first")
    parser.add_argument("--discard-edits", action="store_true", help="with --rebuild: drop edits in vendor/")
    parser.add_argument("--extra", action="append", default=[], metavar="NAME", help=f"one of: {', '.join(EXTRAS)}")
    arguments = parser.parse_args(argv)
    if arguments.discard_edits and not arguments.rebuild:
        parser.error("--discard-edits goes with --rebuild")
    try:
        check_tools(tuple(sys.version_info[:3]))
        check_extras(arguments.extra)
        if arguments.rebuild:
            with locked(ROOT):
                remove(ROOT, arguments.discard_edits)
        prepare(ROOT, arguments.extra)
    except Stop as stop:
        say(f"error: {stop}")
        return stop.code
    except KeyboardInterrupt:
        say("interrupted; the same command finishes it")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
