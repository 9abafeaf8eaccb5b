"""A run's jobs to SLURM, each waiting for the one before it."""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence

from common.errors import UserError
from pipeline.cluster import slurm
from pipeline.cluster.jobs import Job, jobs_of
from pipeline.cluster.script import batch_script, script_path, write_script
from pipeline.cluster.submitted import active_states, read_submitted, write_submitted
from pipeline.config.cluster import JOBS
from pipeline.config.run import RunConfig
from pipeline.records.run_folder import RunFolder
from pipeline.run.checks import check_parallel
from pipeline.run.context import RunContext

SHARES = ("tokenize", "prepare")  # jobs that leave in the cache what runs of the same text or model share


def submit_run(context: RunContext, *, until: str, dry_run: bool, after: Sequence[str] = ()) -> dict[str, list[str]]:
    """Write the batch scripts of what is not done, up to a job, and submit them, or only show them.

    Args:
        context: the run.
        until: the last job.
        dry_run: whether nothing is submitted or written.
        after: jobs of other runs, whose end the first one of this run waits for.

    Returns:
        By job, the numbers of those that are submitted, now or before.

    Raises:
        UserError: a step was done with other inputs, ranks do not fit, or SLURM refuses a job.
    """
    run = context.run
    submitted = read_submitted(run)
    active = active_states(submitted) if slurm.is_here() else {}
    done = list(jobs_done(context))  # asked after what is active: a job that ends meanwhile is one or the other
    wanted = JOBS[: JOBS.index(until) + 1]
    jobs = [job for job in jobs_of(run) if job.name in wanted and job.name not in done]
    _check(context, jobs)
    for name in done:
        print(f"{name}: done, not submitted", flush=True)
    if jobs and not dry_run and not slurm.is_here():
        raise UserError("sbatch: not found; submit on a host with SLURM's commands, or look with --dry-run")
    if not dry_run:
        _write_run(run, active)
    before: list[str] = []
    numbers: dict[str, list[str]] = {}
    for job in jobs:
        known = submitted.get(job.name, [])
        if any(number in active for number in known):
            print(f"{job.name}: is submitted already, job {' '.join(known)}", flush=True)
            before = numbers[job.name] = known
            continue
        waits_for = [] if before else after
        before = numbers[job.name] = _hand_over(job, before, _show if dry_run else _submit, waits_for)
        if not dry_run:
            submitted[job.name] = before
            write_submitted(run, submitted)
            print(f"{job.name}: job {' '.join(before)}   log {job.log}", flush=True)
    if not dry_run:
        print(f"see: python -m pipeline status {context.folder.run_file}", flush=True)
    return numbers


def _hand_over(
    job: Job, before: list[str], submit: Callable[[Job, int, list[str]], str], after: Sequence[str] = ()
) -> list[str]:
    """Submit a job, or the chain of jobs that stands for it; they start when one of ``before`` has ended well.

    Args:
        job: which.
        before: the numbers of the jobs before it.
        submit: is given the job, its place in the chain and sbatch's options, and returns its number.
        after: jobs that must have ended, well or not, before it starts; none where there are any ``before``.
    """
    numbers: list[str] = []
    cluster = job.run.cluster
    for attempt in range(1 + (cluster.max_restarts if cluster.restart == "chain" else 0)):
        # Separated by ?, one is enough; by a comma, all are needed. The jobs of a chain after the one that
        # gets the step done can never start, and SLURM takes them back.
        conditions = [f"afternotok:{':'.join(numbers)}"] if numbers else []
        conditions += ["?".join(f"afterok:{number}" for number in before)] if before and not numbers else []
        conditions += [f"afterany:{':'.join(after)}"] if after and not numbers else []
        options = [f"--dependency={','.join(conditions)}", "--kill-on-invalid-dep=yes"] if conditions else []
        try:
            numbers.append(submit(job, attempt, options))
        except UserError:
            slurm.cancel(numbers)
            raise
    return numbers


def _submit(job: Job, attempt: int, options: list[str]) -> str:
    """Write a script and hand it to SLURM; its number."""
    if attempt == 0:
        job.error.unlink(missing_ok=True)
        job.events.unlink(missing_ok=True)
    return slurm.submit(options, write_script(job, attempt))


def _show(job: Job, attempt: int, options: list[str]) -> str:
    """Print what :func:`_submit` would do; what stands for the number that SLURM would give."""
    script = script_path(job, attempt)
    print(f"--- {shlex.join(slurm.sbatch_command(options, script))}\n{batch_script(job, attempt)}", flush=True)
    return f"JOB_OF_{script.stem}"


def _write_run(run: RunConfig, active: Mapping[str, object]) -> None:
    """The resolved run, which the jobs read; while some do, it stays as it is.

    Raises:
        UserError: jobs are active with other settings.
    """
    folder = RunFolder(run.folder)
    if active and folder.run_file.is_file() and folder.run_file.read_text(encoding="utf-8") != RunFolder.text(run):
        raise UserError(
            f"{folder.run_file}: jobs {' '.join(active)} are active with other settings; scancel them first, "
            "or give the run another name"
        )
    RunFolder.create(run)


def _check(context: RunContext, jobs: list[Job]) -> None:
    """What can be known before anything is submitted."""
    for job in jobs:
        if any(step.needs_ranks for step in job.steps):
            try:
                check_parallel(context, job.config.world_size, "cuda" if job.config.gpus_per_node else "cpu")
            except UserError as error:
                ranks = f"{job.config.nodes} nodes x {job.config.tasks_per_node} ranks"
                raise UserError(f"cluster.{job.name}: {ranks}: {error}") from error


def jobs_done(context: RunContext) -> Iterator[str]:
    """The jobs whose steps are all done, up to the first that is not.

    Raises:
        UserError: a step of the next job was done with other inputs.
    """
    for job in jobs_of(context.run):
        if not all(step.is_done(context) for step in job.steps):
            break
        yield job.name
