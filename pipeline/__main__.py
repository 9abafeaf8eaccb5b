"""python -m pipeline VERB RUN.yaml [--set key=value …]"""

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path

from common.errors import EXIT_CODE, AgreedError, BusyError, OwnError, UserError
from common.launch_environment import become_rank, is_first_rank, listen_early, set_variables
from pipeline import checkpoint_verbs
from pipeline.config.cluster import JOBS
from pipeline.config.load import load_run
from pipeline.distributed.watchdog import EXIT_STUCK, LOST_PEER
from pipeline.run.fetch import with_fetched
from pipeline.run.run_folder import STEPS, RunFolder
from pipeline.run.run_lock import RunLock

VERBS = {
    "run": "every step that is not done yet, in order.\nReads the run's YAML; writes output_dir/NAME/.",
    "tokenize": "text to token shards.\nReads data.*.path; writes cache_dir/tokens/.",
    "similarity": "how alike languages look to each layer.\nReads tokens and the dense model; writes similarity.json.",
    "allocate": "how many experts each layer gets.\nReads similarity.json and the budget; writes expert_plan.json.",
    "upcycle": "the dense model to a DeepSpeed-MoE checkpoint.\nReads model and expert_plan.json; writes upcycled/.",
    "train": "train a stage on all ranks.\nReads upcycled/ and tokens; writes stage1/ or stage2/.",
    "evaluate": "bits per character on held-out text.\nReads checkpoints and tokens; writes evaluation.json.",
    "report": "what was measured, to look at.\nReads the run's folder; writes report.html.",
    "fetch": "what the run names on the hub, at a fixed revision, so that no later step needs a network.\n"
    "Reads model and data; writes to the hub's cache and output_dir/NAME/fetched.json.",
    "submit": "the steps that are not done to SLURM, one job after the other.\n"
    "Reads the run's cluster section; writes output_dir/NAME/jobs/.",
    "status": "which step is done, running, waiting or failed.\nReads the run's folder and SLURM; writes nothing.",
    "estimate": "parameters, memory a rank, network, checkpoints and hours, before anything runs.\n"
    "Reads RUN.yaml and the model's config; writes nothing.",
    "check": "whether the ranks of a cluster reach each other, how fast, and whether their software is the same.\n"
    "Reads RUN.yaml's cluster.environment if it is given; writes nothing.",
}
READ_ONLY = ("status", "check", "estimate")
WITHOUT_LOCK = (*READ_ONLY, "fetch", "submit")  # they may be asked while the run goes on
_RANKS = ("train", "evaluate", "check")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m pipeline", description="Teach a language model new languages.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, text in VERBS.items():
        short = text.replace("\n", " ")
        sub = verbs.add_parser(
            verb, help=short, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        run = sub.add_argument("run", metavar="RUN.yaml", help="such as launch/runs/quickstart.yaml")
        if verb == "check":
            run.nargs = "?"
        sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the run")
        sub.add_argument("--force", action="store_true", help="do it again, also where inputs have changed")
        _add_options(verb, sub)
    checkpoint_verbs.add_parsers(verbs)
    return parser.parse_args(arguments)


def _add_options(verb: str, parser: argparse.ArgumentParser) -> None:
    if verb == "run":
        parser.add_argument("--from", dest="first", choices=STEPS, default=STEPS[0], help="begin with this step")
        parser.add_argument("--until", choices=STEPS, default=STEPS[-1], help="stop after this step")
    if verb == "train":
        parser.add_argument("--stage", type=int, choices=(1, 2), help="1 or 2; without it, both")
    if verb == "evaluate":
        parser.add_argument("--checkpoint", metavar="TAG", help="base, stage1, stage2/best, stage1/step000050 …")
        parser.add_argument("--report", action="store_true", help="then write the report")
    if verb == "submit":
        parser.add_argument("--dry-run", action="store_true", help="show the batch scripts, submit nothing")
        parser.add_argument("--until", choices=JOBS, default=JOBS[-1], help="submit up to this one")
    if verb == "estimate":
        parser.add_argument("--ranks", type=int, help="how many; the run's parallel.ranks without it")
        parser.add_argument("--ep-size", type=int, help="the run's parallel.ep_size without it")
        parser.add_argument("--device", help="h100, h200, a100 …, or gigabytes such as 80GB; without it the CPU")
        parser.add_argument("--tokens-per-second", type=float, help="of all ranks; for the hours")
    if verb == "check":
        parser.add_argument("--ranks", type=int, default=2, help="how many to start where no launcher did")
        parser.add_argument("--megabytes", type=int, default=64, help="the largest message")
    if verb in _RANKS:
        parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from deepspeed's launcher


def main(arguments: list[str]) -> int:
    """Do what the command line says."""
    options = parse(arguments)
    if options.verb in checkpoint_verbs.VERBS:
        from pipeline.distributed.process_group import device_type

        device_type()
        return checkpoint_verbs.run(options)
    run = load_run(options.run, options.set) if options.run else None
    set_variables(run.cluster.environment if run else {})
    if run and options.verb != "fetch":
        run = with_fetched(run)
    from pipeline import commands  # imports torch, which reads the variables
    from pipeline.distributed.process_group import device_type

    device_type()
    if run is None:
        return commands.check(options)
    writes = is_first_rank() and options.verb not in WITHOUT_LOCK
    with RunLock(run.folder) if writes else nullcontext():
        if writes:
            RunFolder.create(run)
        return commands.DO[options.verb](run, options)


def command_line(*, launched: bool = False) -> int:
    """:func:`main`, with a user's mistake as one line and exit code 2: once, where all ranks see the same.

    Args:
        launched: whether a launcher may have made this process a rank.
    """
    try:
        if launched:
            listen_early()
            become_rank()
        return main(sys.argv[1:])
    except UserError as error:
        own = isinstance(error, OwnError) or (_has_joined() and not isinstance(error, AgreedError))
        if is_first_rank() or own:
            line = f"error: {'' if is_first_rank() else 'rank ' + os.environ['RANK'] + ': '}{error}"
            print(line, file=sys.stderr, flush=True)
            # For the batch script: to try again is no use.
            if "STEP_ERROR" in os.environ and not isinstance(error, BusyError):
                Path(os.environ["STEP_ERROR"]).write_text(f"{line}\n", encoding="utf-8")
        return EXIT_CODE
    except RuntimeError as error:
        if not _has_joined() or not any(word in str(error) for word in LOST_PEER):
            raise
        reason = str(error).splitlines()[0]
        print(f"error: rank {os.environ['RANK']}: lost the other ranks ({reason})", file=sys.stderr, flush=True)
        os._exit(EXIT_STUCK)  # the process group can't be left in order


def _has_joined() -> bool:
    """Whether this process is in a group of ranks; imports nothing that is not there."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized()


if __name__ == "__main__":
    sys.exit(command_line())
