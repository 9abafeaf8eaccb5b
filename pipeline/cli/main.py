"""What each verb of the command line does, and a user's mistake as one line and exit code 2."""

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from common.errors import EXIT_CODE, AgreedError, BusyError, OwnError, UserError, interrupted
from common.launch_environment import become_rank, is_first_rank, listen_early, set_variables
from pipeline.cli.arguments import CHECKPOINT_VERBS, COMPARE, IMPORT, NEW, RUN_VERBS, SWEEP, parse
from pipeline.config.load import load_run
from pipeline.config.run import RunConfig
from pipeline.distributed.failures import has_joined, told_by_ranks
from pipeline.records.run_folder import ERRORS_FOLDER, RunFolder
from pipeline.run.checks import check_model
from pipeline.run.context import RunContext
from pipeline.run.exporting import export_run
from pipeline.run.fetch import fetch_run, with_fetched
from pipeline.run.generating import generate
from pipeline.run.new_run import write_new_run
from pipeline.run.pushing import push_run
from pipeline.run.run_lock import RunLock
from pipeline.run.steps import STEP_NAMES, STEPS, step_named, steps_of
from pipeline.run.tasks import Asked, fetch_tasks
from pipeline.sweep.config import Sweep, read_sweep

# What a verb needs torch for is imported where the verb is done: torch reads variables that the run sets before.
JOB_SETTINGS = "job-settings"  # of launch/run.sh: which SLURM job the command line after it stands for
READS_MODEL = ("run", "submit", *(step.verb for step in STEPS if step.keeps_manifest))
WITHOUT_LOCK = (
    "status",
    "check",
    "estimate",
    "fetch",
    "submit",
    "generate",
    "push",
)  # they may be asked while the run is active


def _run_all(context: RunContext, options: argparse.Namespace) -> int:
    """Every step that is not done, from ``options.first`` to ``options.until``."""
    from pipeline.run.runner import run_steps

    wanted = STEP_NAMES[STEP_NAMES.index(options.first) : STEP_NAMES.index(options.until) + 1]
    steps = [step for step in steps_of(context.run) if step.name in wanted]
    run_steps(context, steps, from_the_first=options.first == STEP_NAMES[0])
    return 0


def _train(context: RunContext, options: argparse.Namespace) -> int:
    """The stage that is named, or all.

    Raises:
        OwnError: a GPU's memory is full.
    """
    import torch

    from pipeline.run.runner import train_steps

    if options.stage:
        context.run.stage(options.stage)  # it may have no such stage
    names = [f"stage{options.stage}"] if options.stage else context.stages
    try:
        train_steps(context, [step_named(name) for name in [*names, *["evaluate"] * options.evaluate]])
    except torch.OutOfMemoryError as error:
        from pipeline.distributed.process_group import join
        from pipeline.estimate.out_of_memory import out_of_memory

        left = [name for name in names if not context.folder.has_manifest(name)]
        if not left:
            raise  # of the evaluation
        number = int(left[0].removeprefix("stage"))
        raise OwnError(out_of_memory(context.run, number, join().world_size, join().device)) from error
    return 0


def _evaluate(context: RunContext, options: argparse.Namespace) -> int:
    """Score the last checkpoints, or the one named, and on tasks if asked to; then write the report if asked to.

    Raises:
        UserError: an option makes no sense, or there is no such task or checkpoint.
    """
    from pipeline.run.runner import do_step, evaluate, evaluate_tasks

    step = step_named("evaluate")
    if options.tasks is not None:
        evaluate_tasks(context, step, Asked(options.tasks, options.few_shot, options.checkpoint))
    elif options.few_shot is not None:
        raise UserError(f"--few-shot {options.few_shot}: is of --tasks NAMES; give both, or leave it out")
    else:
        evaluate(context, step, options.checkpoint)
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


def _allocate(context: RunContext, options: argparse.Namespace) -> int:
    """How many experts each layer gets; or only the plans of several budgets."""
    if options.budgets is None:
        return _one_step(context, options)
    from pipeline.run.budgets import budgets_table

    print(budgets_table(context, options.budgets, options.ranks, options.ep_size, options.device), flush=True)
    return 0


def _export(context: RunContext, options: argparse.Namespace) -> int:
    """A checkpoint as a Hugging Face folder."""
    export_run(context, options.checkpoint, options.dtype, options.to, options.native, options.serve, options.graft)
    return 0


def _push(context: RunContext, options: argparse.Namespace) -> int:
    """An exported folder to the hub."""
    push_run(context, options.to, options.folder, private=options.private)
    return 0


def _generate(context: RunContext, options: argparse.Namespace) -> int:
    """Continuations of prompts.

    Raises:
        UserError: an option makes no sense, or there is no such checkpoint.
    """
    from pipeline.evaluation.generate import Sampling

    if options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {options.max_new_tokens}: give at least 1")
    if options.temperature < 0:
        raise UserError(f"--temperature {options.temperature:g}: give 0 or more")
    sampling = Sampling(options.max_new_tokens, options.temperature, options.seed)
    generate(context, options.prompt, options.stage, sampling, shows_experts=options.show_experts)
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


def _fetch(context: RunContext, options: argparse.Namespace) -> int:
    """What the run names on the hub, and the data of tasks."""
    if options.tasks is not None:
        fetch_tasks(context, Asked(options.tasks))
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
        run = load_run(options.run, options.set) if options.run else None
        return check_ranks(join(), options.megabytes, run)
    named = [options.run] if options.run else []
    sets = [f"--set={change}" for change in options.set]
    arguments = ["check", *named, *sets, "--megabytes", str(options.megabytes)]
    start_ranks(arguments, options.ranks, entry="check.sh")
    return 0


def _import(options: argparse.Namespace) -> int:
    """An exported folder as a base."""
    from pipeline.run.importing import import_exported

    import_exported(options.folder, options.to)
    return 0


def _compare(options: argparse.Namespace) -> int:
    """Runs side by side."""
    from pipeline.comparison.write import compare_runs

    compare_runs(options.runs, options.against, options.to)
    return 0


def _sweep(sweep: Sweep, options: argparse.Namespace) -> int:
    """Many runs of one base."""
    from pipeline.sweep.sweep import do_sweep, show_sweep, submit_sweep

    def do(run: RunConfig) -> None:
        set_variables(run.environment)
        words = ["run", str(RunFolder(run.folder).run_file), *(["--force"] if options.force else [])]
        _do_verb(run, parse(words))

    if options.submit:
        submit_sweep(sweep, force=options.force, dry_run=options.dry_run)
    elif options.dry_run:
        show_sweep(sweep)
    else:
        do_sweep(sweep, do, force=options.force)
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
    "allocate": _allocate,
    "train": _train,
    "evaluate": _evaluate,
    "export": _export,
    "push": _push,
    "generate": _generate,
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
    from pipeline.cluster.batch import job_of_options, print_settings, settings_of_options

    if not any(argument in RUN_VERBS for argument in arguments):
        arguments = ["train", *arguments]
    options = parse(arguments)
    print_settings(settings_of_options(job_of_options(load_run(options.run, options.set), options), options))
    return 0


def main(arguments: list[str]) -> int:
    """Do what the command line says."""
    if arguments[:1] == [JOB_SETTINGS]:
        return _job_settings(arguments[1:])
    options = parse(arguments)
    run: RunConfig | None = None
    sweep = read_sweep(options.sweep) if options.verb == SWEEP else None
    if options.verb in RUN_VERBS and options.run:
        run = load_run(options.run, options.set)
    of = run or (sweep.base if sweep else None)
    set_variables(of.environment if of else {})
    from pipeline.distributed.device import device_type  # imports torch, which reads the variables

    device_type()
    if options.verb == NEW:
        write_new_run(options.path, options.model, options.old, options.new)
        return 0
    if options.verb == IMPORT:
        return _import(options)
    if options.verb == COMPARE:
        return _compare(options)
    if sweep is not None:
        return _sweep(sweep, options)
    if options.verb in CHECKPOINT_VERBS:
        return _checkpoint(options)
    if run is None or options.verb == "check":
        with told_by_ranks(None):
            return _check(options)
    return _do_verb(run, options)


def _do_verb(run: RunConfig, options: argparse.Namespace) -> int:
    """Do a verb of a run, as its only writer where it writes."""
    from pipeline.distributed.process_group import leave

    if options.verb != "fetch":
        run = with_fetched(run)
    only_shows = options.verb in WITHOUT_LOCK or getattr(options, "budgets", None) is not None
    writes = is_first_rank() and not only_shows
    quiet = not is_first_rank() or only_shows
    redo = options.force and options.verb != "run"
    context = RunContext(run, force=options.force or options.changed, redo=redo, quiet=quiet)
    if options.verb in READS_MODEL:
        check_model(context)
    with RunLock(run.folder) if writes else nullcontext():
        if writes:
            RunFolder.create(run)
        with told_by_ranks(run.folder / ERRORS_FOLDER):
            code = DO[options.verb](context, options)
            leave()
        return code


def command_line(*, launched: bool = False) -> int:
    """:func:`main`, with a user's mistake as one line and exit code 2: once, where all ranks see the same.

    Ctrl-C is one line and exit code 130; ranks see to it themselves, see :mod:`pipeline.distributed.stop_request`.

    Args:
        launched: whether a launcher may have made this process a rank.
    """
    try:
        if launched:
            listen_early()
            become_rank()
        return main(sys.argv[1:])
    except UserError as error:
        own = isinstance(error, OwnError) or (has_joined() and not isinstance(error, AgreedError))
        if is_first_rank() or own:
            line = f"error: {'' if is_first_rank() else 'rank ' + os.environ['RANK'] + ': '}{error}"
            print(line, file=sys.stderr, flush=True)
            # For the batch script: trying again would not help.
            if "STEP_ERROR" in os.environ and not isinstance(error, BusyError):
                Path(os.environ["STEP_ERROR"]).write_text(f"{line}\n", encoding="utf-8")
        return EXIT_CODE
    except KeyboardInterrupt:
        return interrupted()
