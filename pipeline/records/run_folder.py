"""A run's folder: what lies where, and which steps are done with which inputs."""

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from common.errors import UserError
from common.files import sha256_file, write_text
from pipeline.config.run import RunConfig
from pipeline.records.step_manifest import StepInputs, StepManifest

RUN_FILE = "run.yaml"  # the settings, resolved
FETCHED_FILE = "fetched.json"  # what was downloaded from the hub, at which commits
SHARED_STAGE_FILE = "shared_stage.json"  # which run of a sweep trains stage 1 for this one too
STATISTICS_FILE = "data_statistics.json"  # figures of each set's text
SIMILARITY_FILE = "similarity.json"  # how alike languages look to each layer
PLAN_FILE = "expert_plan.json"  # how many experts each layer has
UPCYCLED = "upcycled"  # a link to the untrained mixture in the cache
EVALUATION_FILE = "evaluation.json"  # what the last checkpoints were scored at
REPORT_FILE = "report.html"
VALIDATION_BASE_FILE = "validation_base.json"  # how the dense model scores what validations compare with it
ERRORS_FOLDER = "errors"  # what ranks that failed have left: tracebacks, NCCL's last collectives
TASKS_FOLDER = "tasks"  # the held-out sets as tasks of lm-eval's
JOBS_FOLDER = "jobs"  # batch scripts, logs and events of SLURM's jobs
# In stage1/ and stage2/, beside the checkpoints:
METRICS_FILE = "metrics.jsonl"
VALIDATION_FILE = "validation.jsonl"
BEST_FILE = "best.json"
INPUTS_FILE = "inputs.json"  # what the stage's result depends on, from the moment it begins


@dataclass(frozen=True)
class RunFolder:
    """``path`` holds the resolved run and what its steps have made."""

    path: Path

    @classmethod
    def create(cls, run: RunConfig) -> "RunFolder":
        """Make the folder and write the resolved run into it."""
        folder = cls(run.folder)
        text = cls.text(run)
        if not folder.run_file.is_file() or folder.run_file.read_text(encoding="utf-8") != text:
            write_text(folder.run_file, text)
        return folder

    @staticmethod
    def text(run: RunConfig) -> str:
        """The resolved run as YAML."""
        return yaml.safe_dump(run.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)

    @property
    def run_file(self) -> Path:
        """The resolved run."""
        return self.path / RUN_FILE

    def __truediv__(self, name: str) -> Path:
        """A file or folder in it."""
        return self.path / name

    def evaluation_of(self, tag: str) -> Path:
        """What a checkpoint that the user names was scored at."""
        return self.path / "evaluations" / f"{tag.replace('/', '-')}.json"

    def manifest_path(self, step: str) -> Path:
        """Where a step's manifest lies."""
        return self.path / "manifests" / f"{step}.json"

    @property
    def tasks_done(self) -> Path:
        """What ``evaluate --tasks`` writes last."""
        return self.manifest_path("tasks")

    def has_manifest(self, step: str) -> bool:
        """Whether a step has been done, with whatever inputs."""
        return self.manifest_path(step).is_file()

    def manifest(self, step: str) -> StepManifest:
        """The manifest of a step that must be done.

        Raises:
            UserError: it is not done.
        """
        if not self.has_manifest(step):
            raise UserError(
                f"{step}: not done in {self.path}; do it first: python -m pipeline run {self.run_file} --until {step}"
            )
        return StepManifest.load(self.manifest_path(step))

    def manifests(self, steps: Iterable[str]) -> dict[str, StepManifest]:
        """By step, the manifests of those that are done, in the given order."""
        return {step: StepManifest.load(self.manifest_path(step)) for step in steps if self.has_manifest(step)}

    def inputs_of(self, step: str) -> StepInputs | None:
        """What a step was done with or has begun with; None if it was neither."""
        if self.has_manifest(step):
            return self.manifest(step).done_with
        return StepInputs.load_if_there(self.path / step / INPUTS_FILE)

    def make_room(self, step: str, done_with: StepInputs, *, anew: bool) -> None:
        """Before a step that takes long: what it has left so far stays only if its inputs were the same.

        Args:
            step: its name, also of its folder, where it keeps its inputs from its beginning on.
            done_with: its inputs.
            anew: whether what it has left goes in any case.
        """
        before = self.inputs_of(step)
        if anew or (before is not None and before.inputs != done_with.inputs):
            shutil.rmtree(self.path / step, ignore_errors=True)
        self.manifest_path(step).unlink(missing_ok=True)

    def finish(self, step: str, done_with: StepInputs, outputs: dict[str, Any], figures: dict[str, Any]) -> None:
        """Record that a step is done; the last thing it writes."""
        StepManifest.of(step, done_with, outputs, figures).save(self.manifest_path(step))

    def link_upcycled(self, target: Path) -> None:
        """Make ``upcycled`` a relative link to a folder in the cache."""
        link = self.path / UPCYCLED
        if link.is_symlink() or link.exists():
            link.unlink()
        link.symlink_to(os.path.relpath(target.resolve(), self.path.resolve()), target_is_directory=True)

    def hash_of(self, step: str) -> str:
        """What later steps name a step's result by."""
        self.manifest(step)
        return sha256_file(self.manifest_path(step))[:16]
