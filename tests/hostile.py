# SPDX-License-Identifier: Apache-2.0
"""A folder and an environment of a caller in which a command that looks around itself would find the wrong code."""

from pathlib import Path

HOSTILE = {
    "PYTHONHOME": "/nonexistent", "PYTHONSTARTUP": "/nonexistent", "PYTHONPLATLIBDIR": "x", "PYTHONUSERBASE": "/x",
    "PYTHONWARNINGS": "error", "PYTHONOPTIMIZE": "2", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0", "PYTHONINSPECT": "1", "LC_ALL": "C", "CDPATH": "/",
}  # fmt: skip


def hostile_folder(place: Path) -> dict[str, str]:
    """A folder with what a user may have in it, and variables that lead there and elsewhere; the latter."""
    for name in ("datasets", "trl", "m3po_lab", "json"):
        (place / "folder" / name).mkdir(parents=True)
        (place / "folder" / name / "__init__.py").write_text("raise SystemExit('the wrong one')\n")
        (place / "packages" / name).mkdir(parents=True)
        (place / "packages" / name / "__init__.py").write_text("raise SystemExit('the wrong one')\n")
    return {**HOSTILE, "PYTHONPATH": str(place / "packages")}
