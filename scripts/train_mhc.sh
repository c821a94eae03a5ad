#!/usr/bin/env bash
# Pretrain NanoChat with and without hyper-connections and compare: bash scripts/train_mhc.sh [configs/mhc_X.yaml] [--seeds 0 1 2] [--flag value ...]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" python -m m3po_lab.pretrain_pair "$@"
