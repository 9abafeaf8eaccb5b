"""A run's folder: what lies where, and which steps are done with which inputs."""

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from common.errors import UserError
from common.files import read_json, sha256_file, write_json, write_text
from pipeline.config.run import RunConfig

STEPS = ("tokenize", "similarity", "allocate", "upcycle", "stage1", "stage2", "evaluate", "report")
PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True)
class RunFolder:
    """``path``/manifests/STEP.json says that a step is done, from which inputs, with which outputs and figures."""

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
        return self.path / "run.yaml"

    def manifest_path(self, step: str) -> Path:
        """Where a step's manifest lies."""
        return self.path / "manifests" / f"{step}.json"

    def manifest(self, step: str) -> dict[str, Any]:
        """The manifest of a step that must be done.

        Raises:
            UserError: it is not done.
        """
        path = self.manifest_path(step)
        if not path.is_file():
            raise UserError(
                f"{step}: not done in {self.path}; do it first: python -m pipeline run {self.run_file} --until {step}"
            )
        return read_json(path)

    def is_done(self, step: str, inputs: dict[str, Any], *, force: bool) -> bool:
        """Whether a step is done with exactly these inputs.

        Raises:
            UserError: it is done with others, and ``force`` is not given; the line names them.
        """
        path = self.manifest_path(step)
        if not path.is_file():
            return False
        changes = _changes(read_json(path)["inputs"], inputs)
        if not changes:
            return True
        if not force:
            raise UserError(
                f"{step}: done in {self.path} with other inputs: {'; '.join(changes[:3])}"
                f"{' and more' if len(changes) > 3 else ''}. Add --force to do it again, or give the run another name"
            )
        return False

    def finish(
        self, step: str, inputs: dict[str, Any], *, outputs: dict[str, Any], figures: dict[str, Any] | None = None
    ) -> None:
        """Record that a step is done; the last thing it writes."""
        versions = {name: importlib.metadata.version(name) for name in PACKAGES} | {
            "python": platform.python_version()
        }
        manifest = {"step": step, "inputs": inputs, "outputs": outputs, "figures": figures or {}, "versions": versions}
        write_json(self.manifest_path(step), manifest)

    def forget(self, step: str) -> None:
        """Take back that a step is done."""
        self.manifest_path(step).unlink(missing_ok=True)

    def link(self, name: str, target: Path) -> None:
        """Make ``name`` in the run's folder a relative link to a folder in the cache."""
        link = self.path / name
        if link.is_symlink() or link.exists():
            link.unlink()
        link.symlink_to(os.path.relpath(target.resolve(), self.path.resolve()), target_is_directory=True)

    def hash_of(self, step: str) -> str:
        """What later steps name a step's result by."""
        self.manifest(step)
        return sha256_file(self.manifest_path(step))[:16]


def _changes(before: Any, now: Any, key: str = "") -> list[str]:
    """Which leaves of nested dicts differ, as "key was x, is y"."""
    if isinstance(before, dict) and isinstance(now, dict):
        lines = []
        for name in sorted({*before, *now}):
            lines += _changes(before.get(name), now.get(name), f"{key}.{name}" if key else name)
        return lines
    return [] if before == now else [f"{key} was {before}, is {now}"]
