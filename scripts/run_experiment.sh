#!/usr/bin/env bash
# Run a study, variants over random seeds that a YAML file says before the first run:
#   bash scripts/run_experiment.sh configs/studies/X.yaml [--dry-run] [--jobs N] [--output_dir DIR]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" python -m m3po_lab.experiments.run_m3po_experiment "$@"
