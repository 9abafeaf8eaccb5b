"""What launch/batch.sh is told where a user gives launch/train.sh to sbatch: python -m pipeline job-settings …"""

import argparse
import shlex

from common.errors import UserError
from pipeline.cluster.jobs import Job, jobs_of
from pipeline.config.run import RunConfig
from pipeline.records.run_folder import RunFolder


def job_of_options(run: RunConfig, options: argparse.Namespace) -> Job:
    """The job that a command line stands for.

    Args:
        run: the run that it names.
        options: the parsed command line.

    Raises:
        UserError: no job does this.
    """
    name = options.verb
    if name == "train":
        name = "train --evaluate" if options.evaluate else f"stage{options.stage or run.stage_numbers[-1]}"
    job = next((job for job in jobs_of(run) if [step.name for step in job.steps] == [name]), None)
    if job is None:
        raise UserError(f"{name}: no batch job does this alone; use python -m pipeline submit {options.run}")
    return job


def settings_of_options(job: Job, options: argparse.Namespace) -> dict[str, str]:
    """What launch/batch.sh is told of the job of a command line; with tasks it is done when they are."""
    settings = job.settings(restart="requeue")
    if getattr(options, "tasks", None) is not None:
        settings["STEP_DONE"] = str(RunFolder(job.run.folder.absolute()).tasks_done)
    return settings


def print_settings(settings: dict[str, str]) -> None:
    """Print a job's settings for the shell."""
    for name, value in settings.items():
        print(f"export {name}={shlex.quote(value)}")
