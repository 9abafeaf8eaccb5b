"""What launch/batch.sh is told where a user gives launch/train.sh to sbatch: python -m pipeline.cluster.batch …"""

import shlex
import sys

from common.errors import UserError, exit_on_user_error
from pipeline.__main__ import VERBS, parse
from pipeline.cluster.jobs import Job
from pipeline.config.load import load_run
from pipeline.config.run import RunConfig


def step_settings(job: Job, restart: str, attempt: int = 0) -> dict[str, str]:
    """The variables that launch/batch.sh reads.

    Args:
        attempt: where a chain of jobs takes the place of a requeued one, how many came before.
    """
    return {
        "STEP": job.name,
        "STEP_DONE": str(job.done_file),
        "STEP_JOBS": str(job.folder),
        "STEP_RESTART": restart,
        "STEP_ATTEMPT": str(attempt),
        "STEP_MAX_RESTARTS": str(job.run.cluster.max_restarts),
    }


def job_of_arguments(arguments: list[str]) -> Job:
    """The job that launch/train.sh's arguments stand for.

    Raises:
        UserError: no job does this.
    """
    if not any(argument in VERBS for argument in arguments):
        arguments = ["train", *arguments]
    options = parse(arguments)
    run: RunConfig = load_run(options.run, options.set)
    if options.verb == "train":
        return Job(f"stage{options.stage or (2 if run.stage2 else 1)}", run)
    if options.verb in ("tokenize", "evaluate"):
        return Job(options.verb, run)
    raise UserError(f"{options.verb}: no batch job does this alone; use python -m pipeline submit {options.run}")


def main() -> int:
    """Print the settings for the shell."""
    job = job_of_arguments(sys.argv[1:])
    for name, value in step_settings(job, restart="requeue").items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_user_error(main))
