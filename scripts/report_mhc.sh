#!/usr/bin/env bash
# What the hyper-connections of a checkpoint do: bash scripts/report_mhc.sh CHECKPOINT [--flag value ...]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
make --no-print-directory -s -C "$root" env
exec "$root/.venv/bin/python" -m m3po_lab.report_mhc "$@"
