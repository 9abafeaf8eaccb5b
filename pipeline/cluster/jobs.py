"""The jobs of a run: which steps each does, and when it is done."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.config.cluster import JOBS, JobConfig
from pipeline.config.run import RunConfig

STEPS_OF_JOB = {
    "tokenize": ("tokenize",),
    "prepare": ("similarity", "allocate", "upcycle"),
    "stage1": ("stage1",),
    "stage2": ("stage2",),
    "evaluate": ("evaluate",),
}


@dataclass(frozen=True)
class Job:
    """One job of a run."""

    name: str
    run: RunConfig

    @property
    def config(self) -> JobConfig:
        """What it asks of SLURM."""
        return self.run.cluster.job(self.name)

    @property
    def folder(self) -> Path:
        """Where scripts, logs, events and errors of all jobs lie."""
        return self.run.folder.absolute() / "jobs"

    @property
    def script(self) -> Path:
        """The batch script."""
        return self.folder / f"{self.name}.sh"

    @property
    def log(self) -> Path:
        """What the job prints, over all its starts."""
        return self.folder / f"{self.name}.log"

    @property
    def events(self) -> Path:
        """A line for each start, signal and end."""
        return self.folder / f"{self.name}.events"

    @property
    def error(self) -> Path:
        """Why trying again is no use."""
        return self.folder / f"{self.name}.error"

    @property
    def done_file(self) -> Path:
        """The manifest that says that its last step is done."""
        return self.run.folder.absolute() / "manifests" / f"{STEPS_OF_JOB[self.name][-1]}.json"

    @property
    def arguments(self) -> list[str]:
        """What it gives to launch/train.sh."""
        run_file = str(self.run.folder.absolute() / "run.yaml")
        return {
            "tokenize": ["tokenize", run_file],
            "prepare": ["run", run_file, "--from", "similarity", "--until", "upcycle"],
            "stage1": ["train", run_file, "--stage", "1"],
            "stage2": ["train", run_file, "--stage", "2"],
            "evaluate": ["evaluate", run_file, "--report"],
        }[self.name]


def jobs_of(run: RunConfig) -> list[Job]:
    """All jobs of a run, in order."""
    return [Job(name, run) for name in JOBS if name != "stage2" or run.stage2 is not None]
