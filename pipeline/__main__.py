"""python -m pipeline VERB RUN.yaml [--set key=value …]"""

import sys

try:
    from pipeline.cli.main import command_line
except KeyboardInterrupt:
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(command_line())
