"""python -m data_prep.demo [--into inputs] [--languages en,el,hu,tr]: fetch the quickstart's model and texts."""

import argparse
import sys
from pathlib import Path

from data_prep.demo.inputs import LANGUAGES, fetch_inputs
from pipeline.errors import exit_on_user_error


def main() -> int:
    """Fetch what is missing; 0 when every input is there."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.demo", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--into", type=Path, default=Path("inputs"), metavar="FOLDER", help="default: inputs")
    parser.add_argument(
        "--languages",
        default="en,el,hu,tr",
        metavar="L,L",
        help=f"of {','.join(LANGUAGES)}; default: en,el,hu,tr",
    )
    arguments = parser.parse_args()
    languages = [language.strip() for language in arguments.languages.split(",") if language.strip()]
    fetch_inputs(arguments.into, languages)
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_user_error(main))
