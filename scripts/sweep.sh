#!/usr/bin/env bash
# Train modes or gating functions over random seeds and compare them:
#   bash scripts/sweep.sh [configs/X.yaml] [--modes ... | --gates ...] [--axis flag=value,value] [--seeds ...] [--flag value]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" python -m m3po_lab.sweep "$@"
