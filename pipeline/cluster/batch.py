"""What launch/batch.sh is told where a user gives launch/train.sh to sbatch: python -m pipeline job-settings …"""

import argparse
import shlex

from common.errors import UserError
from pipeline.cluster.jobs import Job, jobs_of
from pipeline.config.run import RunConfig


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


def print_settings(job: Job) -> None:
    """Print the job's settings for the shell."""
    for name, value in job.settings(restart="requeue").items():
        print(f"export {name}={shlex.quote(value)}")
