#!/usr/bin/env bash
# Remove .venv and vendor/ and make both again. Refuses while vendor/ has edits; --discard-edits drops them.
# EXTRA=unsloth, as for `make env`: with that extra; without it, the new environment has it only where there is a GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHONPATH=scripts exec "${PYTHON:-python3}" -m patchset.environment --rebuild ${EXTRA:+"--extra=$EXTRA"} "$@"
