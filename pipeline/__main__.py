"""python -m pipeline VERB RUN.yaml [--set key=value …]"""

import sys

from pipeline.cli.main import command_line

if __name__ == "__main__":
    sys.exit(command_line())
