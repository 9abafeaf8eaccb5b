"""The command line: its verbs, what each does, and a user's mistake as one line and exit code 2."""

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from common.errors import EXIT_CODE, AgreedError, BusyError, OwnError, UserError
from common.launch_environment import become_rank, is_first_rank, listen_early, set_variables
from pipeline.config.cluster import JOBS
from pipeline.config.load import load_run
from pipeline.config.run import RunConfig
from pipeline.distributed.watchdog import EXIT_STUCK, LOST_PEER
from pipeline.records.run_folder import RunFolder
from pipeline.run.context import RunContext
from pipeline.run.fetch import fetch_run, with_fetched
from pipeline.run.run_lock import RunLock
from pipeline.run.steps import STEP_NAMES, STEPS, step_named, steps_of

# What a verb needs torch for is imported where the verb is done: torch reads variables that the run sets before.
RUN_VERBS = {
    "run": "every step that is not done yet, in order.\nReads the run's YAML; writes output_dir/NAME/.",
    **{step.verb: step.help for step in STEPS},
    "fetch": "what the run names on the hub, at a fixed revision, so that no later step needs a network.\n"
    "Reads model and data; writes to the hub's cache and output_dir/NAME/fetched.json.",
    "submit": "the steps that are not done to SLURM, one job after the other.\n"
    "Reads the run's cluster section; writes output_dir/NAME/jobs/.",
    "status": "which step is done, running, waiting or failed.\nReads the run's folder and SLURM; writes nothing.",
    "estimate": "parameters, memory per rank, network, checkpoints and hours, before anything runs.\n"
    "Reads RUN.yaml and the model's config; writes nothing.",
    "check": "whether the ranks of a cluster reach each other, how fast, and whether their software is the same.\n"
    "Reads RUN.yaml's cluster.environment if it is given; writes nothing.",
}
CHECKPOINT_VERBS = {
    "checkpoint": "whether a checkpoint is sound (verify), or what it is (inspect), without a model.\n"
    "Reads CHECKPOINT.",
    "resize": "a checkpoint for another number of ranks, without a model.\n"
    "Reads CHECKPOINT; writes CHECKPOINT-ranksN-epM beside it. A run does the same by itself when it resumes.",
}
JOB_SETTINGS = "job-settings"  # of launch/run.sh: which SLURM job the command line after it stands for
WITHOUT_LOCK = ("status", "check", "estimate", "fetch", "submit")  # they may be asked while the run is active


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m pipeline", description="Teach a language model new languages.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, text in RUN_VERBS.items():
        sub = _add_verb(verbs, verb, text)
        run = sub.add_argument("run", metavar="RUN.yaml", help="such as launch/runs/quickstart.yaml")
        if verb == "check":
            run.nargs = "?"
        sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the run")
        sub.add_argument("--force", action="store_true", help="do it again, also where inputs have changed")
        # Of ranks that `run --force` starts: do it although inputs have changed, but nothing that they do not touch.
        sub.add_argument("--changed", action="store_true", help=argparse.SUPPRESS)
        if verb in OPTIONS:
            OPTIONS[verb](sub)
        if verb == "check" or any(step.verb == verb and step.needs_ranks for step in STEPS):
            sub.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from deepspeed's launcher
    for verb, text in CHECKPOINT_VERBS.items():
        sub = _add_verb(verbs, verb, text)
        if verb == "checkpoint":
            sub.add_argument("action", choices=("verify", "inspect"))
        sub.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="such as runs/NAME/stage1/step000050")
        if verb == "resize":
            sub.add_argument("--ranks", type=int, required=True)
            sub.add_argument("--ep-size", type=int, required=True)
    return parser.parse_args(arguments)


def _add_verb(verbs: Any, verb: str, text: str) -> argparse.ArgumentParser:
    sub: argparse.ArgumentParser = verbs.add_parser(
        verb,
        help=text.replace("\n", " "),
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return sub


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", dest="first", choices=STEP_NAMES, default=STEP_NAMES[0], help="begin with this step")
    parser.add_argument("--until", choices=STEP_NAMES, default=STEP_NAMES[-1], help="stop after this step")


def _train_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stage", type=int, choices=(1, 2), help="1 or 2; without it, both")


def _evaluate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="TAG", help="base, stage1, stage2/best, stage1/step000050 …")
    parser.add_argument("--report", action="store_true", help="then write the report")


def _submit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="show the batch scripts, submit nothing")
    parser.add_argument("--until", choices=JOBS, default=JOBS[-1], help="submit up to this one")


def _estimate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, help="how many; the run's parallel.ranks without it")
    parser.add_argument("--ep-size", type=int, help="the run's parallel.ep_size without it")
    parser.add_argument("--device", help="h100, h200, a100 …, or gigabytes such as 80GB; without it the CPU")
    parser.add_argument("--tokens-per-second", type=float, help="of all ranks; for the hours")


def _check_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, default=2, help="how many to start where no launcher did")
    parser.add_argument("--megabytes", type=int, default=64, help="the largest message")


OPTIONS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "run": _run_options,
    "train": _train_options,
    "evaluate": _evaluate_options,
    "submit": _submit_options,
    "estimate": _estimate_options,
    "check": _check_options,
}


def _run_all(context: RunContext, options: argparse.Namespace) -> int:
    """Every step that is not done, from ``options.first`` to ``options.until``."""
    from pipeline.run.runner import run_steps

    wanted = STEP_NAMES[STEP_NAMES.index(options.first) : STEP_NAMES.index(options.until) + 1]
    steps = [step for step in steps_of(context.run) if step.name in wanted]
    run_steps(context, steps, from_the_first=options.first == STEP_NAMES[0])
    return 0


def _train(context: RunContext, options: argparse.Namespace) -> int:
    """The stage that is named, or all."""
    from pipeline.run.runner import train_steps

    if options.stage:
        context.run.stage(options.stage)  # it may have no such stage
    names = [f"stage{options.stage}"] if options.stage else context.stages
    train_steps(context, [step_named(name) for name in names])
    return 0


def _evaluate(context: RunContext, options: argparse.Namespace) -> int:
    """Score the last checkpoints, or the one named; then write the report if asked to."""
    from pipeline.run.runner import do_step, evaluate_named

    step = step_named("evaluate")
    if options.checkpoint:
        evaluate_named(context, options.checkpoint)
    elif not step.is_done(context):
        do_step(context, step)
    if options.report and is_first_rank():
        do_step(context, step_named("report"))
    return 0


def _one_step(context: RunContext, options: argparse.Namespace) -> int:
    """A step that one process does."""
    from pipeline.run.runner import do_step

    step = step_named(options.verb)
    if not step.is_done(context):
        do_step(context, step)
    return 0


def _submit(context: RunContext, options: argparse.Namespace) -> int:
    """The steps that are not done to SLURM."""
    from pipeline.cluster.submit import submit_run

    submit_run(context, until=options.until, dry_run=options.dry_run)
    return 0


def _status(context: RunContext, _options: argparse.Namespace) -> int:
    """Where each step is."""
    from pipeline.cluster.status import show_status

    show_status(context)
    return 0


def _fetch(context: RunContext, _options: argparse.Namespace) -> int:
    """What the run names on the hub."""
    fetch_run(context.run)
    return 0


def _estimate(context: RunContext, options: argparse.Namespace) -> int:
    """What the run will take."""
    from pipeline.estimate.report import estimate

    return estimate(context.run, options)


def _check(options: argparse.Namespace) -> int:
    """What the ranks' network and software are like: as a rank, or by starting ranks on this machine."""
    from pipeline.cluster.check import check_ranks
    from pipeline.distributed.launcher import start_ranks
    from pipeline.distributed.process_group import join, under_launcher

    if under_launcher():
        return check_ranks(join(), options.megabytes)
    named = [options.run] if options.run else []
    sets = [f"--set={change}" for change in options.set]
    arguments = ["check", *named, *sets, "--megabytes", str(options.megabytes)]
    start_ranks(arguments, options.ranks, entry="check.sh")
    return 0


def _checkpoint(options: argparse.Namespace) -> int:
    """Verify, inspect or resize a checkpoint.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    from pipeline.checkpoint.inspect import find_tag, inspect_text, verify_text
    from pipeline.checkpoint.resize import resize
    from pipeline.distributed.parallel_dims import ParallelDims

    folder = find_tag(options.checkpoint)
    if options.verb == "resize":
        print(f"resize: {resize(folder, ParallelDims.from_options(options.ranks, options.ep_size))}")
    else:
        print(verify_text(folder) if options.action == "verify" else inspect_text(folder))
    return 0


DO: dict[str, Callable[[RunContext, argparse.Namespace], int]] = {
    **{step.verb: _one_step for step in STEPS},
    "run": _run_all,
    "train": _train,
    "evaluate": _evaluate,
    "submit": _submit,
    "status": _status,
    "fetch": _fetch,
    "estimate": _estimate,
}


def _job_settings(arguments: list[str]) -> int:
    """Print what launch/batch.sh is to know of the job that a command line of launch/train.sh stands for.

    Raises:
        UserError: no job does this.
    """
    from pipeline.cluster.batch import job_of_options, print_settings

    if not any(argument in RUN_VERBS for argument in arguments):
        arguments = ["train", *arguments]
    options = parse(arguments)
    print_settings(job_of_options(load_run(options.run, options.set), options))
    return 0


def main(arguments: list[str]) -> int:
    """Do what the command line says."""
    if arguments[:1] == [JOB_SETTINGS]:
        return _job_settings(arguments[1:])
    options = parse(arguments)
    run: RunConfig | None = None
    if options.verb in RUN_VERBS and options.run:
        run = load_run(options.run, options.set)
    set_variables(run.cluster.environment if run else {})
    from pipeline.distributed.process_group import device_type  # imports torch, which reads the variables

    device_type()
    if options.verb in CHECKPOINT_VERBS:
        return _checkpoint(options)
    if run is None or options.verb == "check":
        return _check(options)
    if options.verb != "fetch":
        run = with_fetched(run)
    writes = is_first_rank() and options.verb not in WITHOUT_LOCK
    quiet = not is_first_rank() or options.verb in WITHOUT_LOCK
    redo = options.force and options.verb != "run"
    context = RunContext(run, force=options.force or options.changed, redo=redo, quiet=quiet)
    with RunLock(run.folder) if writes else nullcontext():
        if writes:
            RunFolder.create(run)
        return DO[options.verb](context, options)


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
            # For the batch script: trying again would not help.
            if "STEP_ERROR" in os.environ and not isinstance(error, BusyError):
                Path(os.environ["STEP_ERROR"]).write_text(f"{line}\n", encoding="utf-8")
        return EXIT_CODE
    except RuntimeError as error:
        if not _has_joined() or not any(word in str(error) for word in LOST_PEER):
            raise
        reason = str(error).splitlines()[0]
        print(f"error: rank {os.environ['RANK']}: lost the other ranks ({reason})", file=sys.stderr, flush=True)
        os._exit(EXIT_STUCK)  # the process group cannot be left in order


def _has_joined() -> bool:
    """Whether this process is in a group of ranks; imports nothing that is not there."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized()
