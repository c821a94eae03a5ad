#!/usr/bin/env bash
# Evaluate a pretrained NanoChat by lm-eval: bash scripts/eval_mhc.sh CHECKPOINT [--gate G] [--baseline CHECKPOINT] [--data DIR] [--limit N]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
make --no-print-directory -s -C "$root" env
exec "$root/.venv/bin/python" -m m3po_lab.eval_mhc "$@"
