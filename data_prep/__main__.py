"""python -m data_prep RUN.yaml: tokenize a run's text into the cache, by itself.

Alone it uses this machine's cores; under mpirun, MPI ranks; as one of SLURM's tasks (srun, or an array), it shares the
work with the others. `python -m data_prep inspect RUN.yaml` shows samples of its shards as text, `verify` checks them.
`extend-tokenizer RUN.yaml --add 8000` makes a tokenizer for the run's `model.tokenizer`: the model's own, with merges
learned on the training text of the new sets.
"""

import argparse
import sys
from pathlib import Path

from common.errors import exit_on_user_error
from common.settings import load_settings
from data_prep.config import PreparationConfig
from data_prep.executor.launch import BACKENDS
from data_prep.extend.extend import TOKENS, extend_tokenizer
from data_prep.prepare import prepare
from data_prep.statistics.show_samples import inspect_sets, open_sets

VERBS = ("prepare", "inspect", "verify", "extend-tokenizer")


def main() -> int:
    """Do what the command line says; 0 when the tokens are in the cache, or are as they should be."""
    arguments = sys.argv[1:]
    verb = arguments.pop(0) if arguments and arguments[0] in VERBS else "prepare"
    parser = argparse.ArgumentParser(
        prog="python -m data_prep" + (f" {verb}" if verb != "prepare" else ""),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN.yaml", help="a run; for inspect and verify also the folder of a set")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the run")
    if verb == "prepare":
        parser.add_argument("--executor", choices=BACKENDS, default="auto", help="what to run tasks on")
        parser.add_argument("--workers", type=int, help="processes on this machine; by default one per core")
        parser.add_argument("--force", action="store_true", help="accept a tokenizer that has changed")
    if verb == "inspect":
        parser.add_argument("--samples", type=int, default=3, help="samples of each set")
        parser.add_argument("--length", type=int, default=256, help="tokens of each sample")
        parser.add_argument("--only", metavar="SET", help="this set alone")
    if verb == "extend-tokenizer":
        parser.add_argument("--add", type=int, required=True, metavar="N", help="tokens to add")
        parser.add_argument("--to", type=Path, metavar="FOLDER", help="to write; by default RUN-tokenizer beside it")
        parser.add_argument("--tokens", type=int, default=TOKENS, help="read of each set (%(default)s)")
    options = parser.parse_args(arguments)
    if verb == "prepare":
        config = load_settings(PreparationConfig, options.run, options.set)
        prepare(config, options.executor, options.workers, force=options.force)
        return 0
    if verb == "extend-tokenizer":
        config = load_settings(PreparationConfig, options.run, options.set)
        target = options.to or Path(options.run).with_name(f"{Path(options.run).stem}-tokenizer")
        extend_tokenizer(config, options.add, target, options.tokens)
        return 0
    sets = open_sets(options.run, options.set)
    if verb == "inspect":
        inspect_sets(sets, options.only, options.samples, options.length)
        return 0
    for one in sets.values():
        one.verify(show=True)
        print(f"{one.folder}: every file is as it was written", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_user_error(main))
