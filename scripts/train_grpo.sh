#!/usr/bin/env bash
# Train: bash scripts/train_grpo.sh [configs/X.yaml] [--flag value ...]
# ACCELERATE_CONFIG=file.yaml trains in several processes (docs/processes.md); without it, one process.
set -euo pipefail
module=m3po_lab.train
if [[ -n "${ACCELERATE_CONFIG:-}" ]]; then module=m3po_lab.launch; fi
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" python -m "$module" "$@"
