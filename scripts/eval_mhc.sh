#!/usr/bin/env bash
# Evaluate a pretrained NanoChat by lm-eval: bash scripts/eval_mhc.sh CHECKPOINT [--gate G] [--baseline CHECKPOINT] [--controller FOLDER] [--data DIR] [--limit N]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" python -m m3po_lab.eval_mhc "$@"
