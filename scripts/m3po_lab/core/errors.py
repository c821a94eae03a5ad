# SPDX-License-Identifier: Apache-2.0
"""What goes wrong besides bugs is one line: a wrong input, or an environment that fails. Nothing large is imported."""

import errno
import os
import re
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parents[3]
ERROR_LOG = "error.log"  # in the run folder: the traceback of a failure that was printed in one line
OWN_PACKAGES = ("m3po_lab", "patchset")

# What to do about an error of the operating system.
MENDS = {
    errno.ENOSPC: "the disk is full: free some space, or name a folder on another disk",
    errno.EDQUOT: "your share of the disk is used up: free some space, or name a folder on another disk",
    errno.EFBIG: "files may not be that large here: raise the limit (ulimit -f), or name a folder on another disk",
    errno.EROFS: "nothing can be written there: name a folder on another disk",
    errno.EACCES: "give this user the right to it, or name another place",
    errno.EPERM: "give this user the right to it, or name another place",
    errno.ENOTDIR: "a part of this path is a file: name another place",
    errno.EISDIR: "it is a folder, where a file is wanted",
    errno.ENOENT: "it has been moved or deleted: put it back, or name another place",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.EMFILE: "allow more open files (ulimit -n 65536)",
    errno.EIO: "the disk or the way to it is broken: name a folder on another disk",
}
MEMORY_TEXTS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")  # of torch's RuntimeErrors
HUB_KINDS = ("huggingface_hub.errors.OfflineModeIsEnabled", "huggingface_hub.errors.LocalEntryNotFoundError")
HUB_MEND = (
    "give a local folder or file, set HF_HUB_OFFLINE=1 to use what was downloaded before, or mend the network and its "
    "variables (HTTPS_PROXY, ALL_PROXY, NO_PROXY, HF_ENDPOINT)"
)


class UserError(Exception):
    """What its user can mend. Its text is one line that names the flag or file, the rule and what to do."""


def one_line(error: BaseException | str) -> str:
    """The first paragraph of an error's text on one line."""
    text = str(error).strip().split("\n\n")[0]
    return " ".join(text.split()) or type(error).__name__


def short(error: BaseException | str, width: int = 240) -> str:
    """`one_line`, cut behind a word where it is longer than `width`; an ellipsis shows that."""
    text = one_line(error)
    cut = textwrap.shorten(text, width, placeholder=" …")
    return cut if cut != "…" else f"{text[: width - 1]}…"  # one long word


def failure(error: BaseException, batch_flag: str | None = None) -> str | None:
    """What the environment did, and its mend, in a line; None for any other error, which is a bug.

    Args:
        error: of the operating system, of the memory, of the Hub, of a library that writes files, of a missing package.
        batch_flag: the flag to lower where memory is short.
    """
    text = str(error)
    kinds = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__]
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in text for word in MEMORY_TEXTS)
    ):
        mend = f"lower {batch_flag}" if batch_flag else "close other programs, or take a machine with more"
        return f"the memory is used up ({short(error, 160)}): {mend}."
    if any(kind.startswith("httpx.") or kind in HUB_KINDS for kind in kinds):
        return f"the Hub cannot be reached ({short(error, 160)}): {HUB_MEND}."
    if isinstance(error, RuntimeError) and "inline_container.cc" in text:  # how torch.save says that a write failed
        return f"a file could not be written ({short(error, 160)}): {MENDS[errno.ENOSPC]}."
    if isinstance(error, ImportError):
        return _missing_package(error)
    if isinstance(error, OSError):
        text = f"{error.strerror}: {error.filename}" if error.filename is not None else error.strerror or text
    elif "safetensors._safetensors_rust.SafetensorError" not in kinds:
        return None
    match = re.search(r"\(os error (\d+)\)", text)  # of a library written in Rust
    number = getattr(error, "errno", None) or (int(match[1]) if match else 0)
    mend = f"; {MENDS[number]}" if number in MENDS else ""
    return f"{short(text).rstrip('.')}{mend}."


def _missing_package(error: ImportError) -> str | None:
    """The line for a package that is not installed; None where a module of ours or a name in a module is missing."""
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.split(".")[0] not in OWN_PACKAGES:
        return f"the package {error.name} is not installed: run 'make env', or .venv/bin/pip install it."
    if error.name is None:  # from a library that looked for one
        return f"{short(error).rstrip('.')}."
    return None


@contextmanager
def failures_said(
    folder: Path | None = None, batch_flag: str | None = None, way_on: Callable[[], str] = str
) -> Iterator[None]:
    """Turn a failure of the environment into a `UserError`, and keep its traceback; a bug passes as it is.

    Args:
        folder: the run folder, for the traceback.
        batch_flag: see `failure`.
        way_on: says how to go on.
    """
    try:
        yield
    except Exception as error:  # a UserError, and all that `failure` does not know, go on
        line = failure(error, batch_flag)
        if line is None:
            raise
        raise UserError(" ".join(filter(None, [line, way_on(), keep_traceback(error, folder)]))) from error


def keep_traceback(error: BaseException, folder: Path | None) -> str:
    """Write a traceback into the folder, or else a temporary file, or else on the terminal; says where."""
    text = "".join(traceback.format_exception(error))
    rank = os.environ.get("RANK", "0")
    if folder is not None and folder.is_dir():
        file = folder / (ERROR_LOG if rank == "0" else f"error-{rank}.log")
        try:
            file.write_text(text, encoding="utf-8")
            return f"Traceback: {file}"
        except OSError:  # as a rule the same failure
            with suppress(OSError):
                file.unlink(missing_ok=True)
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", prefix="m3po-error-", suffix=".log", delete=False
        ) as temporary:
            temporary.write(text)
        return f"Traceback: {temporary.name}"
    except OSError:
        print(text, file=sys.stderr)
        return ""


def exit_code(action: Callable[[], int | None], when_stopped: str) -> int:
    """A command's: what `action` returns, None being 0; 2 for a `UserError`, 130 for Ctrl-C, with a line for either."""
    try:
        with failures_said():
            return action() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{when_stopped}", file=sys.stderr)
        return 130
