"""python -m data_prep RUN.yaml [--set key=value …]: tokenize a run's text into the cache, by itself."""

import argparse
import sys

from data_prep.prepare import prepare_run
from pipeline.errors import exit_on_user_error
from pipeline.run_file import load_run


def main() -> int:
    """Tokenize; 0 when the tokens are in the cache."""
    parser = argparse.ArgumentParser(prog="python -m data_prep", description=__doc__.split(": ", 1)[1])
    parser.add_argument("run", metavar="RUN.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the run")
    arguments = parser.parse_args()
    prepare_run(load_run(arguments.run, arguments.set))
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_user_error(main))
