"""A run's jobs to SLURM, each waiting for the one before it."""

from collections.abc import Mapping

from common.errors import UserError
from pipeline.cluster import slurm
from pipeline.cluster.jobs import Job, jobs_of
from pipeline.cluster.script import batch_script, write_script
from pipeline.cluster.submitted import active_states, read_submitted, write_submitted
from pipeline.config.cluster import JOBS
from pipeline.config.run import RunConfig
from pipeline.run.rank_steps import RankSteps
from pipeline.run.run_folder import RunFolder


def submit_run(steps: RankSteps, *, until: str, dry_run: bool) -> None:
    """Write the batch scripts of what is not done, up to a job, and submit them, or only show them.

    Raises:
        UserError: a step was done with other inputs, ranks do not fit, or SLURM refuses a job.
    """
    run = steps.run
    done = steps_done(steps)
    wanted = JOBS[: JOBS.index(until) + 1]
    jobs = [job for job in jobs_of(run) if job.name in wanted and job.name not in done]
    _check(steps, jobs)
    for name in done:
        print(f"{name}: done, not submitted", flush=True)
    if dry_run:
        for job in jobs:
            print(f"--- {job.script}\n{batch_script(job)}", flush=True)
        return
    if jobs and not slurm.is_here():
        raise UserError("sbatch: not found; submit on a host with SLURM's commands, or look with --dry-run")
    submitted = read_submitted(run)
    active = active_states(submitted)
    _write_run(run, active)
    before: list[str] = []
    for job in jobs:
        known = submitted.get(job.name, [])
        if any(number in active for number in known):
            print(f"{job.name}: is submitted already, job {' '.join(known)}", flush=True)
            before = known
            continue
        before = _submit_job(job, before)
        submitted[job.name] = before
        write_submitted(run, submitted)
        print(f"{job.name}: job {' '.join(before)}   log {job.log}", flush=True)
    print(f"see: python -m pipeline status {steps.folder.run_file}", flush=True)


def _submit_job(job: Job, before: list[str]) -> list[str]:
    """Submit a job, or the chain of jobs that stands for it; they start when one of ``before`` has ended well."""
    job.error.unlink(missing_ok=True)
    job.events.unlink(missing_ok=True)
    numbers: list[str] = []
    cluster = job.run.cluster
    for attempt in range(1 + (cluster.max_restarts if cluster.restart == "chain" else 0)):
        # Separated by ?, one is enough; by a comma, all are needed. The jobs of a chain after the one that
        # gets the step done can never start, and SLURM takes them back.
        conditions = [f"afternotok:{':'.join(numbers)}"] if numbers else []
        conditions += ["?".join(f"afterok:{number}" for number in before)] if before and not numbers else []
        options = [f"--dependency={','.join(conditions)}", "--kill-on-invalid-dep=yes"] if conditions else []
        try:
            numbers.append(slurm.submit(options, str(write_script(job, attempt))))
        except UserError:
            slurm.cancel(numbers)
            raise
    return numbers


def _write_run(run: RunConfig, active: Mapping[str, object]) -> None:
    """The resolved run, which the jobs read; while some do, it stays as it is.

    Raises:
        UserError: jobs go on with other settings.
    """
    folder = RunFolder(run.folder)
    if active and folder.run_file.is_file() and folder.run_file.read_text(encoding="utf-8") != RunFolder.text(run):
        raise UserError(
            f"{folder.run_file}: jobs {' '.join(active)} go on with other settings; scancel them first, "
            "or give the run another name"
        )
    RunFolder.create(run)


def _check(steps: RankSteps, jobs: list[Job]) -> None:
    """What can be known before anything is submitted."""
    for job in jobs:
        if job.name in ("stage1", "stage2", "evaluate"):
            try:
                steps.check_parallel(job.config.world_size, "cuda" if job.config.gpus_per_node else "cpu")
            except UserError as error:
                ranks = f"{job.config.nodes} nodes x {job.config.tasks_per_node} ranks"
                raise UserError(f"cluster.{job.name}: {ranks}: {error}") from error


def steps_done(steps: RankSteps) -> list[str]:
    """The jobs whose steps are all done, up to the first that is not."""
    checks = {
        "tokenize": steps.tokenize_is_done,
        "prepare": lambda: steps.similarity_is_done() and steps.allocate_is_done() and steps.upcycle_is_done(),
        "stage1": lambda: steps.stage_is_done(1, say=False),
        "stage2": lambda: steps.stage_is_done(2, say=False),
        "evaluate": lambda: steps.evaluate_is_done(say=False),
    }
    done = []
    for job in jobs_of(steps.run):
        if not checks[job.name]():
            break
        done.append(job.name)
    return done
