#!/usr/bin/env bash
# Remove .venv and vendor/ and make both again. Refuses while vendor/ has edits; --discard-edits drops them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHONPATH=scripts exec "${PYTHON:-python3}" -m patchset.environment --rebuild "$@"
