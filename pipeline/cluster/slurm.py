"""What SLURM is asked and told: sbatch, squeue, scontrol."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError, one_line

ACTIVE = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "REQUEUED", "STOPPED")


@dataclass(frozen=True)
class JobState:
    """A job as SLURM knows it: ``state`` as squeue spells it, and why; ``time_left`` before its limit."""

    number: str
    state: str
    reason: str = ""
    time_left: str = ""

    @property
    def is_active(self) -> bool:
        """Whether it runs, or will."""
        return self.state in ACTIVE and self.reason != "DependencyNeverSatisfied"


def is_here() -> bool:
    """Whether this host has SLURM's commands."""
    return shutil.which("sbatch") is not None and shutil.which("squeue") is not None


def sbatch_command(options: list[str], script: Path) -> list[str]:
    """What submits a batch script."""
    return ["sbatch", "--parsable", *options, str(script)]


def submit(options: list[str], script: Path) -> str:
    """Hand a batch script over; returns the job's number.

    Raises:
        UserError: SLURM refuses it; the line holds its words.
    """
    done = subprocess.run(sbatch_command(options, script), capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{script}: sbatch refuses it: {one_line(done.stderr, 300)}; change the run's cluster section")
    return done.stdout.strip().split(";")[0]


def cancel(numbers: list[str]) -> None:
    """Take jobs back."""
    subprocess.run(["scancel", *numbers], capture_output=True, check=False)


def job_states(numbers: list[str]) -> dict[str, JobState]:
    """The jobs that SLURM still knows: the queue's, and for a few minutes those that have ended.

    Raises:
        UserError: the queue can't be asked.
    """
    if not numbers:
        return {}
    # Asked by user, not by number: squeue ends with an error where one of the numbers is forgotten already.
    words = ["squeue", "--noheader", "--me", "--states=all", "--format=%i|%T|%r|%L"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"squeue: {one_line(done.stderr, 300)}; ask again on a login node")
    rows = [JobState(*line.split("|", 3)) for line in done.stdout.splitlines() if line.count("|") == 3]
    return {row.number: row for row in rows if row.number in numbers}
