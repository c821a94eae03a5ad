#!/usr/bin/env bash
# What the hyper-connections of a checkpoint do: bash scripts/report_mhc.sh CHECKPOINT [--flag value ...]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" python -m m3po_lab.report_mhc "$@"
