#!/usr/bin/env bash
# Run a module of scripts/patchset, which comes before the environment: bash scripts/overlay_tool.sh patchset status
# By PYTHON where it is set, else by the Python of .venv (the choice stays until rebuild_env.sh), else by python3.
set -euo pipefail
CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/isolated.sh
python=${PYTHON:-}
if [[ -z $python ]]; then
    python=python3
    if .venv/bin/python -c '' 2>/dev/null; then python=.venv/bin/python; fi
fi
if ! command -v -- "$python" >/dev/null; then
    echo "error: there is no $python here; choose a Python, 3.11 or newer: make env PYTHON=python3.11" >&2
    exit 2
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 7) and "error: this Python is too old: 3.11 is needed")'
PYTHONPATH=scripts exec "$python" -m "$@"
