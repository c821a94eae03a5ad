#!/usr/bin/env bash
# Train modes or gates over seeds and compare them:
#   bash scripts/sweep.sh [configs/X.yaml] [--modes ... | --gates ...] [--axis flag=value,value] [--seeds ...] [--flag value]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
make --no-print-directory -s -C "$root" env
exec "$root/.venv/bin/python" -m m3po_lab.sweep "$@"
