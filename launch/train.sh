#!/usr/bin/env bash
''':' # bash: does nothing. python: opens a string that hides the shell lines below (they hold no triple quotes or backslashes).
exec bash "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/run.sh" "$@"
''' # '
import _entry
