"""python -m data_prep.demo [RUN.yaml] [--set key=value …]: fetch the inputs that a quickstart run names."""

import argparse
import sys
from pathlib import Path

from common.errors import exit_on_user_error
from common.settings import load_settings
from data_prep.config import PreparationConfig
from data_prep.demo.inputs import LANGUAGES, fetch_inputs


def main() -> int:
    """Fetch what is missing; 0 when every input is there."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.demo", description=__doc__.split(": ", 1)[1])
    parser.add_argument("run", nargs="?", metavar="RUN.yaml", help="fetch only what this run reads from FOLDER")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the run")
    parser.add_argument("--into", type=Path, default=Path("inputs"), metavar="FOLDER", help="default: inputs")
    parser.add_argument("--languages", default="en,el,hu,tr", metavar="L,L", help=f"of {','.join(LANGUAGES)}")
    arguments = parser.parse_args()
    if arguments.run:
        names = inputs_of(load_settings(PreparationConfig, arguments.run, arguments.set), arguments.into)
        fetch_inputs(arguments.into, sorted({Path(name).stem for name in names if "/" in name}), names)
    else:
        languages = [language.strip() for language in arguments.languages.split(",") if language.strip()]
        fetch_inputs(arguments.into, languages)
    return 0


def inputs_of(run: PreparationConfig, into: Path) -> set[str]:
    """The names of the inputs that a run reads from the folder, such as "help/el.jsonl"."""
    paths = [Path(run.model.path), *_paths_of(run)]
    return {path.relative_to(into).as_posix() for path in paths if path.is_relative_to(into)}


def _paths_of(run: PreparationConfig) -> list[Path]:
    sources = [source for entry in run.data.sets.values() for source in entry.source_list]
    return [Path(source.path) for source in sources if source.path is not None]


if __name__ == "__main__":
    sys.exit(exit_on_user_error(main))
