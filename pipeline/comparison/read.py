"""The runs that are compared, read from their folders."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import content_key
from pipeline.checkpoint.store import read_manifest
from pipeline.config.load import load_run
from pipeline.config.run import RunConfig
from pipeline.method.allocation import dense_plan
from pipeline.method.stages import find_stage
from pipeline.model.expert_plan import ExpertPlan
from pipeline.model.model_folder import folder_here, model_config
from pipeline.records.checkpoint import HF_FOLDER, NewRows, UpcycledManifest
from pipeline.records.evaluation import BASE, Evaluation
from pipeline.records.run_folder import EVALUATION_FILE, PLAN_FILE, UPCYCLED, RunFolder
from pipeline.records.step_manifest import StepManifest
from pipeline.training.utilization import flops_of_stage

LICENSE = {"__all__": {"license"}}  # of every set
# Keys that change no score, or say which of several runs this is; what else differs makes two runs different.
NO_DIFFERENCE: dict[str, Any] = {
    **dict.fromkeys(
        ("name", "output_dir", "cache_dir", "seed", "validate_", "checkpoint", "parallel", "log", "cluster"), True
    ),
    "data": {"old": LICENSE, "new": LICENSE, "watch": LICENSE},
    "evaluate": {"prompts": True, "new_tokens": True},
}
EVALUATE = "evaluate"


@dataclass(frozen=True)
class ReadRun:
    """One run: its settings, and what it was evaluated at."""

    folder: RunFolder
    run: RunConfig
    evaluation: Evaluation

    @property
    def checkpoint(self) -> str:
        """What is compared: the last one that was scored."""
        return self.evaluation.checkpoints[-1]

    @property
    def sets(self) -> dict[str, str]:
        """The groups of the sets that languages are compared by, watched ones left out, by name."""
        return {name: result.group for name, result in self.evaluation.sets.items() if result.group != "watch"}

    @cached_property
    def difference(self) -> str:
        """A key that is the same for runs that differ by seed alone."""
        return content_key(self.run.model_dump(mode="json", by_alias=True, exclude=NO_DIFFERENCE))

    @cached_property
    def stages(self) -> dict[str, StepManifest]:
        """The manifests of the stages that are done."""
        return self.folder.manifests([f"stage{number}" for number in self.run.stage_numbers])

    @cached_property
    def scored(self) -> dict[str, Any]:
        """What the evaluation was done with: ``sets``, by name a hash of the documents' tokens, and ``window``."""
        if not self.folder.has_manifest(EVALUATE):
            return {"sets": {}, "window": None}
        return self.folder.manifest(EVALUATE).done_with.inputs

    @property
    def tokens(self) -> dict[str, int]:
        """By stage, how many it was trained on."""
        return {name: int(stage.figures["tokens"]) for name, stage in self.stages.items() if "tokens" in stage.figures}

    @property
    def seconds(self) -> float | None:
        """Of all stages' steps; None where a stage did not say."""
        figures = [stage.figures for stage in self.stages.values()]
        if not figures or not all("training_seconds" in found for found in figures):
            return None
        return sum(float(found["training_seconds"]) for found in figures)

    def flops(self) -> float | None:
        """Operations of training; None where the dense model's config is not there, or a stage is not done."""
        config, tokens = self._config(), self.tokens
        if config is None or len(tokens) < len(self.run.stage_numbers):
            return None
        plan = self._plan(config)
        stages = [find_stage(self.run, number) for number in self.run.stage_numbers]
        return sum(flops_of_stage(config, plan, stage, self._new_rows()) * tokens[stage.name] for stage in stages)

    def _new_rows(self) -> NewRows | None:
        """The rows of new tokens that its model has."""
        if self.run.model.tokenizer is None:
            return None
        return read_manifest(self.folder / UPCYCLED, UpcycledManifest).new_rows

    def _config(self) -> Any:
        """The dense model's config: the copy beside the upcycled weights, or the model's own; no hub is asked."""
        folders = (self.folder / UPCYCLED / HF_FOLDER, folder_here(self.run.model))
        found = next((folder for folder in folders if folder and (folder / "config.json").is_file()), None)
        is_planned = self.run.method.is_dense or (self.folder / PLAN_FILE).is_file()
        return model_config(found) if found and is_planned else None

    def _plan(self, config: Any) -> ExpertPlan:
        if self.run.method.is_dense:
            return dense_plan(self.run, config.get_text_config().num_hidden_layers)
        return ExpertPlan.load(self.folder / PLAN_FILE)


def read_runs(names: Sequence[str]) -> list[ReadRun]:
    """The runs of these folders or YAMLs; one that is named twice is read once.

    Raises:
        UserError: one is not a run or not evaluated, or they are scored on different sets.
    """
    folders: dict[Path, Path] = {}
    for folder in map(find_folder, names):
        folders.setdefault(folder.resolve(), folder)
    runs = [_read(RunFolder(folder)) for folder in folders.values()]
    first = runs[0]
    for other in runs[1:]:
        if other.sets != first.sets:
            raise UserError(
                f"{other.folder.path}: scored on {_listed(other.sets)}, but {first.folder.path} on "
                f"{_listed(first.sets)}; compare runs of the same old and new sets"
            )
    return runs


def find_folder(name: str) -> Path:
    """The folder of a run that is named by its folder or its YAML.

    Raises:
        UserError: there is no such run.
    """
    path = Path(name)
    if path.is_dir():
        folder = path
    elif path.is_file():
        folder = load_run(path).folder
        if not folder.is_dir():
            raise UserError(
                f"{path}: has not been run, there is no {folder}; do it first: python -m pipeline run {path}"
            )
    else:
        raise UserError(f"{path}: no such run; name a run's folder, such as runs/quickstart, or its YAML")
    if not RunFolder(folder).run_file.is_file():
        raise UserError(f"{folder}: not a run's folder, it holds no run.yaml; name one such as runs/quickstart")
    return folder


def _read(folder: RunFolder) -> ReadRun:
    run = load_run(folder.run_file)
    evaluation = Evaluation.load_if_there(folder / EVALUATION_FILE)
    if evaluation is None or evaluation.checkpoints[-1:] in ([], [BASE]):
        raise UserError(
            f"{folder.path}: not evaluated, no stage is scored in its evaluation.json; do it first: "
            f"python -m pipeline run {folder.run_file}"
        )
    return ReadRun(folder, run, evaluation)


def labels_of(runs: Sequence[ReadRun]) -> list[str]:
    """A name for each run: its own, or its folder where two have the same."""
    counts = Counter(one.run.name for one in runs)
    return [one.run.name if counts[one.run.name] == 1 else str(one.folder.path) for one in runs]


def _listed(sets: dict[str, str]) -> str:
    return ", ".join(f"{group} {name}" for name, group in sets.items()) or "no old or new set"
