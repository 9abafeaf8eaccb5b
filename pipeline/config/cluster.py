"""The run's ``cluster:`` section: what each of its jobs asks of SLURM."""

import re
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from common.section import Positive, Section

JobName = Literal["tokenize", "prepare", "stage1", "stage2", "evaluate"]
JOBS: tuple[JobName, ...] = get_args(JobName)
_TIME = re.compile(r"^(\d+-)?\d+(:\d+){0,2}$")


class JobConfig(Section):
    """What one job asks SLURM for. SLURM decides whatever has no value here.

    ``ranks_per_node`` is by default the number of GPUs; without any, training and evaluation spread
    ``parallel.ranks`` over the nodes. ``time`` is in SLURM's form: minutes, hours:minutes:seconds or days-hours.
    ``sbatch`` are further options of sbatch. ``setup`` are shell lines that run before the step, such as module load.
    With ``image`` the step runs inside that Apptainer image, with ``image_options``.
    """

    partition: str | None = None
    account: str | None = None
    nodes: Positive = 1
    gpus_per_node: int = Field(default=0, ge=0)
    ranks_per_node: Positive | None = None
    cpus_per_rank: Positive | None = None
    memory: str | None = None
    time: str | None = None
    sbatch: list[str] = []
    setup: list[str] = []
    image: str | None = None
    image_options: list[str] = ["--nv"]

    @field_validator("memory", "time", mode="before")
    @classmethod
    def _number_is_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value

    @field_validator("time")
    @classmethod
    def _time_is_slurms(cls, value: str | None) -> str | None:
        if value is not None and not _TIME.match(value):
            raise ValueError(f"{value!r} is not a time that SLURM takes; write 24:00:00 or 2-00:00:00")
        return value

    @field_validator("sbatch")
    @classmethod
    def _options_begin_with_dashes(cls, value: list[str]) -> list[str]:
        for option in value:
            if not option.startswith("-") or "\n" in option:
                raise ValueError(f"{option!r} is not an option of sbatch; write it as in --constraint=h100")
        return value

    @property
    def tasks_per_node(self) -> int:
        """Ranks per node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.nodes * self.tasks_per_node


class ClusterConfig(Section):
    """What each job of a run asks for; ``every_job`` holds what most of them share.

    ``environment`` are variables that each process of the run gets, however it was launched; they override the
    shell's. ``restart``: with ``requeue``, a job that is stopped before its step is done goes back to the queue. On
    clusters that forbid it, ``chain`` submits ``max_restarts`` further jobs, of which each continues the one before.
    A job saves ``signal_seconds`` before its time limit. If ``tokenize`` has several nodes, they share the text.
    """

    environment: dict[str, str] = {}
    restart: Literal["requeue", "chain"] = "requeue"
    max_restarts: int = Field(default=10, ge=0)
    signal_seconds: Positive = 300
    every_job: JobConfig = JobConfig()
    tokenize: JobConfig = JobConfig()
    prepare: JobConfig = JobConfig()
    stage1: JobConfig = JobConfig()
    stage2: JobConfig = JobConfig()
    evaluate: JobConfig = JobConfig()

    @field_validator("environment", mode="before")
    @classmethod
    def _values_are_text(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for name in value:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(name)):
                raise ValueError(f"{name!r} is not the name of a variable; use letters, digits and _")
        return {str(name): str(entry) if isinstance(entry, int | float) else entry for name, entry in value.items()}

    @model_validator(mode="after")
    def _check(self) -> "ClusterConfig":
        if self.tokenize.gpus_per_node:
            raise ValueError("tokenize.gpus_per_node: tokenizing uses no GPU; remove it")
        if self.job("prepare").world_size > 1:
            raise ValueError("prepare.nodes: the job is one process; give it nodes: 1 and more cpus_per_rank")
        if self.job("tokenize").tasks_per_node > 1:
            raise ValueError(
                "tokenize.ranks_per_node: one process uses all cores of a node; set it to 1, use more nodes"
            )
        return self

    def job(self, name: str) -> JobConfig:
        """What a job asks for: its own keys, and for the others those of ``every_job``."""
        own: JobConfig = getattr(self, name)
        shared = {key: getattr(self.every_job, key) for key in self.every_job.model_fields_set}
        if name in ("tokenize", "prepare"):  # one process per node and at most one GPU, whatever training takes
            gpus = 0 if name == "tokenize" else min(1, self.every_job.gpus_per_node)
            shared |= {"nodes": 1, "ranks_per_node": 1, "gpus_per_node": gpus}
        return JobConfig(**{**shared, **{key: getattr(own, key) for key in own.model_fields_set}})
