#!/usr/bin/env bash
# Run a program of the environment, which is completed first: bash scripts/run.sh tensorboard --logdir runs/mine
set -euo pipefail
root="$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$root/scripts/isolated.sh"
make --no-print-directory -s -C "$root" env >&2
case "${2:-}" in *benchmarks/*.py) export PYTHONPATH="$root/benchmarks" ;; esac  # those programs import each other
exec "$root/.venv/bin/${1:?name a program, e.g. tensorboard or python}" "${@:2}"
