#!/usr/bin/env bash
# Evaluate: bash scripts/eval_gsm8k.sh [checkpoint or model] [--dataset X] [--num_paths N] [--flag value ...]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" python -m m3po_lab.eval_gsm8k "$@"
