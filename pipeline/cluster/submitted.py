"""Which of SLURM's jobs stand for the run's: jobs/submitted.json."""

from common.files import read_json, write_json
from pipeline.cluster import slurm
from pipeline.config.run import RunConfig
from pipeline.records.run_folder import JOBS_FOLDER, RunFolder

FILE_NAME = "submitted.json"


def read_submitted(run: RunConfig) -> dict[str, list[str]]:
    """For each job that was submitted, its numbers: several where a chain stands for it."""
    path = RunFolder(run.folder) / JOBS_FOLDER / FILE_NAME
    return dict(read_json(path)) if path.is_file() else {}


def write_submitted(run: RunConfig, submitted: dict[str, list[str]]) -> None:
    """Keep the numbers."""
    write_json(RunFolder(run.folder) / JOBS_FOLDER / FILE_NAME, submitted)


def active_states(submitted: dict[str, list[str]]) -> dict[str, slurm.JobState]:
    """Those of the jobs that run or will, by number."""
    states = slurm.job_states([number for numbers in submitted.values() for number in numbers])
    return {number: state for number, state in states.items() if state.is_active}
