"""``python -m pipeline sweep``: all runs that are not finished, one by one or as SLURM's jobs; then compare."""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from common.errors import UserError
from pipeline.cluster.submit import SHARES, submit_run
from pipeline.comparison.write import compare_runs
from pipeline.config.cluster import JOBS
from pipeline.config.run import RunConfig
from pipeline.records.run_folder import FETCHED_FILE, RunFolder
from pipeline.run.checks import check_model
from pipeline.run.context import RunContext
from pipeline.run.fetch import with_fetched
from pipeline.run.shared_stage import STAGE, share_stage, trainers
from pipeline.run.steps import steps_of
from pipeline.sweep.config import Sweep

ENDED_BY_SIGNAL = (0, *(128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)))


def do_sweep(sweep: Sweep, do: Callable[[RunConfig], object], *, force: bool = False) -> None:
    """Do what is left of every run, and compare those that are finished.

    A run that fails does not keep the others from being done; a signal ends the sweep.

    Args:
        sweep: its runs.
        do: does a run as ``python -m pipeline run`` does.
        force: whether steps whose inputs have changed are done again.

    Raises:
        UserError: runs are left; the lines before say why.
        SystemExit: a signal ended a run.
    """
    trained_by = trainers(sweep.runs)
    left = []
    for number, run in enumerate(sweep.runs, 1):
        name = f"sweep: {run.name}, {number} of {len(sweep.runs)}"
        _share_fetched(sweep.base, run)
        share_stage(run, trained_by.get(run.name))
        try:
            if is_finished(run, force=force):
                print(f"{name}: done, skipped", flush=True)
                continue
            print(name, flush=True)
            with _own_environment():
                do(run)
            if not is_finished(run):
                left.append(run.name)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            left.append(run.name)
        except SystemExit as end:
            if end.code is None or end.code in ENDED_BY_SIGNAL:
                raise
            left.append(run.name)
    _compare(sweep, left)
    if left:
        raise UserError(
            f"{sweep.name}: {len(left)} of {len(sweep.runs)} runs not finished: {', '.join(left)}; the lines above "
            "say why, and the same command does what is left"
        )


def submit_sweep(sweep: Sweep, *, force: bool = False, dry_run: bool = False) -> None:
    """Submit a chain of jobs for every run that is not finished; where all are, compare them.

    The first jobs of a run wait until those of the run before it have prepared what both share, or until the run that
    trains stage 1 for it too has done so.

    Raises:
        UserError: a run was begun with other inputs, ranks do not fit, or SLURM refuses a job.
    """
    after: list[str] = []
    trained_by = trainers(sweep.runs)
    trained: dict[str, list[str]] = {}  # by run, its jobs that train stage 1
    left = []
    for run in sweep.runs:
        trainer = trained_by.get(run.name)
        if not dry_run:
            _share_fetched(sweep.base, run)
            share_stage(run, trainer)
        if is_finished(run, force=force):
            print(f"sweep: {run.name}: done, not submitted", flush=True)
            continue
        print(f"sweep: {run.name}", flush=True)
        left.append(run.name)
        context = RunContext(with_fetched(run), force=force, quiet=True)
        check_model(context)
        waits_for = trained.get(trainer.name, []) if trainer is not None else []
        jobs = submit_run(context, until=JOBS[-1], dry_run=dry_run, after=waits_for or after)
        if trainer is not None:
            continue  # what it prepares, its trainer has prepared
        trained[run.name] = _named(jobs.get(STAGE, []), run, dry_run=dry_run)
        # A baseline has nothing to prepare but its text; a run of which all is prepared changes nothing.
        numbers = next((jobs[name] for name in reversed(SHARES) if name in jobs), [])
        after = _named(numbers, run, dry_run=dry_run) or after
    if not left:
        _compare(sweep, left)
    else:
        print(f"sweep: {len(left)} of {len(sweep.runs)} runs are left; the same command compares them when they are "
              "done", flush=True)  # fmt: skip


def show_sweep(sweep: Sweep) -> None:
    """A line for each run: done or not."""
    for run in sweep.runs:
        print(f"{run.name}: {'done' if is_finished(run) else 'to do'}", flush=True)


def is_finished(run: RunConfig, *, force: bool = False) -> bool:
    """Whether all steps of a run are done.

    Raises:
        UserError: one was done with other inputs, and ``force`` does not say that it is done again.
    """
    context = RunContext(with_fetched(run), force=force, quiet=True)
    return all(step.is_done(context) for step in steps_of(run) if step.keeps_manifest)  # up to the first that is not


def _named(numbers: list[str], run: RunConfig, *, dry_run: bool) -> list[str]:
    """Numbers of jobs; what is only shown tells the same job of several runs apart."""
    return [f"{number}_OF_{run.name}" for number in numbers] if dry_run else numbers


def _share_fetched(base: RunConfig, run: RunConfig) -> None:
    """What was fetched for the base is fetched for the run."""
    there, here = RunFolder(base.folder) / FETCHED_FILE, RunFolder(run.folder) / FETCHED_FILE
    if there.is_file() and not here.is_file():
        here.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(there, here)


def _compare(sweep: Sweep, left: list[str]) -> None:
    finished = [str(run.folder) for run in sweep.runs if run.name not in left]
    if finished:
        print(flush=True)
        compare_runs(finished, to=sweep.comparison)


@contextmanager
def _own_environment() -> Iterator[None]:
    """Variables that a run sets are gone afterwards."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
