#!/usr/bin/env bash
# Train: bash scripts/train_grpo.sh [configs/X.yaml] [--flag value ...]
# ACCELERATE_CONFIG=file.yaml trains in several processes (docs/processes.md); without it, one process.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
make --no-print-directory -s -C "$root" env
if [[ -n "${ACCELERATE_CONFIG:-}" ]]; then
    exec "$root/.venv/bin/python" -m m3po_lab.launch "$@"
fi
exec "$root/.venv/bin/python" -m m3po_lab.train "$@"
