#!/usr/bin/env bash
# Evaluate: bash scripts/eval_gsm8k.sh [checkpoint or model] [--dataset X] [--num_paths N] [--flag value ...]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
make --no-print-directory -s -C "$root" env
exec "$root/.venv/bin/python" -m m3po_lab.eval_gsm8k "$@"
