#!/usr/bin/env bash
''':' # bash: does nothing. python: opens a string that hides the shell lines below (they hold no triple quotes or backslashes).
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ -f "$here/run.sh" ] || here=${SLURM_SUBMIT_DIR:?}/launch # sbatch runs a copy of this file
exec bash "$here/run.sh" check.sh "$@"
''' # '
import _entry
