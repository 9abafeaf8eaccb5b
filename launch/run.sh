#!/usr/bin/env bash
# What train.sh and check.sh do as shell scripts: a rank where a launcher has made it one, the ranks' start by srun in a
# job of SLURM's, and else the start of the run's ranks on this machine. Usage: run.sh train.sh|check.sh ARGUMENTS
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
entry=$1
shift
python=${PYTHON:-python}
if [ -z "${PYTHON:-}${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$root/.venv/bin/python" ]; then
  python=$root/.venv/bin/python # what the README's commands have made, where no environment is active
fi

started_by_srun() { # step numbers above are SLURM's own: the batch script, an interactive shell
  [[ ${SLURM_STEP_ID:-} =~ ^[0-9]+$ ]] && [ "$SLURM_STEP_ID" -lt 4294967280 ]
}

if { [ -n "${RANK:-}" ] && [ -n "${WORLD_SIZE:-}" ]; } || [ -n "${OMPI_COMM_WORLD_RANK:-}" ] || started_by_srun; then
  trap '' USR1 # a signal that comes before Python listens must not end the rank
  exec "$python" -u "$root/launch/$entry" "$@"
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
verb=${entry%.sh}
if [ -z "${SLURM_JOB_ID:-}" ]; then
  exec "$python" -m pipeline "$verb" "$@"
elif [ "$verb" = check ]; then
  exec srun bash "$root/launch/run.sh" "$entry" "$@"
fi
settings=$("$python" -m pipeline job-settings "$@")
eval "$settings"
exec bash "$root/launch/batch.sh" bash "$root/launch/run.sh" "$entry" "$@"
