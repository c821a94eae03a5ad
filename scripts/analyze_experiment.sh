#!/usr/bin/env bash
# Report on a study, as Markdown and as one HTML file with its figures:
#   bash scripts/analyze_experiment.sh DIR [--output_dir DIR]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" python -m m3po_lab.experiments.analyze_gating_results "$@"
