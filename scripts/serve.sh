#!/usr/bin/env bash
# Serve a checkpoint by vLLM's OpenAI-compatible server, thinking as its mode does (needs make env EXTRA=vllm):
#   bash scripts/serve.sh runs/X/final [flag of vllm serve ...]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" python -m m3po_lab.serve "$@"
