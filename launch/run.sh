#!/usr/bin/env bash
# What launch/train.sh does as a shell script: a rank where a launcher has made it one, else it starts the launcher.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python}
if [ -n "${RANK:-}" ] && [ -n "${WORLD_SIZE:-}" ]; then
  exec "$python" -u "$root/launch/train.sh" "$@"
fi
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m pipeline train "$@"
