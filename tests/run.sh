#!/usr/bin/env bash
# Everything that must hold: lint, types, tests. bash tests/run.sh [--all] [pytest's arguments]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
. launch/environment.sh
ensure_python "$root" requirements.txt tests/requirements.txt
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} OMP_NUM_THREADS=1
select=(-m "not slow")
if [ "${1:-}" = --all ]; then
  select=()
  shift
fi
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
# Two at once, as most of the time goes to starting Python on one core; -n 0 runs them in this process.
exec "$python" -m pytest -q -rs -n 2 --dist loadgroup --no-loadscope-reorder ${select[@]+"${select[@]}"} "$@"
