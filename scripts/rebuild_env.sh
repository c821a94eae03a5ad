#!/usr/bin/env bash
# Remove .venv and vendor/ and make both again. Refuses while vendor/ has edits; --discard-edits drops them.
# PYTHON=python3.12 in front: with that Python (else python3). EXTRA=unsloth: with that extra; without it, the new
# environment has it only where there is a GPU.
set -euo pipefail
export PYTHON="${PYTHON:-python3}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/overlay_tool.sh" patchset.environment --rebuild ${EXTRA:+"--extra=$EXTRA"} "$@"
