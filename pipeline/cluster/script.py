"""The batch script of a job: readable text, made from the run's ``cluster:`` section."""

import os
import shlex
import sys
from pathlib import Path

from common.files import write_text
from pipeline.cluster.jobs import Job
from pipeline.distributed.launcher import ROOT


def batch_script(job: Job, attempt: int = 0) -> str:
    """The text of a job's batch script.

    Args:
        job: which.
        attempt: where a chain of jobs takes the place of a requeued one, how many came before.
    """
    cluster = job.run.cluster
    settings = job.settings(cluster.restart, attempt)
    lines = ["#!/usr/bin/env bash", *(f"#SBATCH {option}" for option in sbatch_options(job)), ""]
    lines += [f"# {job.name} of {job.run.name}. Made by python -m pipeline submit; ends with 0 only when it is done."]
    lines += [f"cd {shlex.quote(os.getcwd())} || exit", *job.config.setup]
    if not job.config.setup and not job.config.image:
        lines.append(f"export PYTHON=${{PYTHON:-{shlex.quote(sys.executable)}}}")
    lines += [f"export {name}={shlex.quote(value)}" for name, value in settings.items()]
    lines.append(f"exec bash {shlex.quote(str(ROOT / 'launch' / 'batch.sh'))} {rank_command(job)}")
    return "\n".join(lines) + "\n"


def sbatch_options(job: Job) -> list[str]:
    """What the job asks of SLURM."""
    config, cluster = job.config, job.run.cluster
    options = [f"--job-name={job.run.name}-{job.name}", f"--output={job.log}", "--open-mode=append"]
    options += [f"--signal=B:USR1@{cluster.signal_seconds}"]
    options += ["--requeue" if cluster.restart == "requeue" else "--no-requeue"]
    options += [f"--nodes={config.nodes}", f"--ntasks-per-node={config.tasks_per_node}"]
    named = {
        "partition": config.partition,
        "account": config.account,
        "cpus-per-task": config.cpus_per_rank,
        "mem": config.memory,
        "time": config.time,
        "gres": f"gpu:{config.gpus_per_node}" if config.gpus_per_node else None,
    }
    options += [f"--{key}={value}" for key, value in named.items() if value is not None]
    return options + list(config.sbatch)


def rank_command(job: Job) -> str:
    """What srun starts for each rank."""
    image = job.config.image
    words = ["apptainer", "exec", *job.config.image_options, image] if image else []
    return shlex.join([*words, "bash", str(ROOT / "launch" / "run.sh"), "train.sh", *job.arguments])


def script_path(job: Job, attempt: int = 0) -> Path:
    """Where the script lies, beside the run; further jobs of a chain have their number in the name."""
    return job.script if not attempt else job.script.with_suffix(f".{attempt}.sh")


def write_script(job: Job, attempt: int = 0) -> Path:
    """Write the script; returns its path."""
    path = script_path(job, attempt)
    write_text(path, batch_script(job, attempt))
    return path
