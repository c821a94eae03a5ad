#!/usr/bin/env bash
# Train a controller of the routing gate of hyper-connections: bash scripts/train_controller.sh CHECKPOINT [configs/controller_X.yaml] [--gates layer] [--flag value ...]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" python -m m3po_lab.train_controller "$@"
