#!/usr/bin/env bash
#SBATCH --requeue --open-mode=append --signal=B:USR1@300
''':' # bash: does nothing. python: opens a string that hides the shell lines below (they hold no triple quotes or backslashes).
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ -f "$here/run.sh" ] || here=${SLURM_SUBMIT_DIR:?}/launch # sbatch runs a copy of this file
exec bash "$here/run.sh" train.sh "$@"
''' # '
import _entry
