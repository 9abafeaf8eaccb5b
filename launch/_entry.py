"""The Python side of train.sh and check.sh: what a launcher runs on each rank."""

import multiprocessing
import os
import signal
import sys

if multiprocessing.parent_process() is None:  # a spawned helper process reads train.sh again: nothing to do there
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # outside of training, Ctrl-C just ends a rank
    os.environ.setdefault("TQDM_DISABLE", "1")  # others' progress bars, of each rank; ours say whether they show
    # ROOT replaces launch/ on the path, where Python put it.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    from pipeline.cli.arguments import RUN_VERBS
    from pipeline.cli.main import command_line

    if not any(argument in RUN_VERBS for argument in sys.argv[1:]):
        sys.argv.insert(1, os.path.basename(sys.argv[0]).removesuffix(".sh"))  # train or check
    # deepspeed's launcher puts --local_rank=N first; argparse wants the verb there.
    first_verb = next(i for i, argument in enumerate(sys.argv) if i and argument in RUN_VERBS)
    sys.argv.insert(1, sys.argv.pop(first_verb))
    sys.exit(command_line(launched=True))
