"""The jobs of a run: which steps each does, when it is done, and what its batch script is told."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.config.cluster import JOBS, JobConfig
from pipeline.config.run import RunConfig
from pipeline.records.run_folder import JOBS_FOLDER, RunFolder
from pipeline.run.step import Step
from pipeline.run.steps import STEPS


@dataclass(frozen=True)
class Job:
    """One job of a run."""

    name: str
    run: RunConfig

    @property
    def config(self) -> JobConfig:
        """What it asks of SLURM. Without GPUs, the run's ranks are spread over its nodes."""
        config = self.run.cluster.job(self.name)
        if config.gpus_per_node or config.ranks_per_node:
            return config
        return config.model_copy(update={"ranks_per_node": -(-self.run.parallel.ranks // config.nodes)})

    @property
    def steps(self) -> list[Step]:
        """The steps that it does and that leave a manifest, in order."""
        return [step for step in STEPS if step.job == self.name and step.keeps_manifest]

    @property
    def folder(self) -> Path:
        """Where scripts, logs, events and errors of all jobs lie."""
        return RunFolder(self.run.folder.absolute()) / JOBS_FOLDER

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
        """Why trying again does not help."""
        return self.folder / f"{self.name}.error"

    @property
    def done_file(self) -> Path:
        """The manifest that says that its last step is done."""
        return RunFolder(self.run.folder.absolute()).manifest_path(self.steps[-1].name)

    @property
    def arguments(self) -> list[str]:
        """What it gives to launch/train.sh: the verb of its one step, or a part of the run."""
        run_file = str(RunFolder(self.run.folder.absolute()).run_file)
        first, last = self.steps[0], self.steps[-1]
        if first is not last:
            return ["run", run_file, "--from", first.name, "--until", last.name]
        if first.verb == "train":
            return ["train", run_file, "--stage", first.name.removeprefix("stage")]
        return [first.verb, run_file, *(["--report"] if first.verb == "evaluate" else [])]

    def settings(self, restart: str, attempt: int = 0) -> dict[str, str]:
        """The variables that launch/batch.sh reads.

        Args:
            restart: requeue or chain.
            attempt: where a chain of jobs takes the place of a requeued one, how many came before.
        """
        return {
            "STEP": self.name,
            "STEP_DONE": str(self.done_file),
            "STEP_JOBS": str(self.folder),
            "STEP_RESTART": restart,
            "STEP_ATTEMPT": str(attempt),
            "STEP_MAX_RESTARTS": str(self.run.cluster.max_restarts),
        }


def jobs_of(run: RunConfig) -> list[Job]:
    """All jobs of a run, in order."""
    jobs = [Job(name, run) for name in JOBS]
    return [job for job in jobs if any(step.applies(run) for step in job.steps)]
