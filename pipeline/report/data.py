"""What a run's folder holds, read and checked; a file that is not there yet is None or empty."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from common.errors import UserError
from common.files import read_json
from common.yaml_reader import parse_yaml
from data_prep.store import StoreStatistics
from pipeline.model.expert_plan import ExpertPlan
from pipeline.records.evaluation import GROUPS, Evaluation, Group
from pipeline.records.metrics import Best, StepRow, ValidationRow
from pipeline.records.run_folder import (
    BEST_FILE,
    EVALUATION_FILE,
    METRICS_FILE,
    PLAN_FILE,
    SIMILARITY_FILE,
    STATISTICS_FILE,
    VALIDATION_FILE,
    RunFolder,
)
from pipeline.records.similarity import Similarity
from pipeline.records.step_manifest import StepManifest

STAGES = ("stage1", "stage2")


@dataclass(frozen=True)
class Stage:
    """One stage's records."""

    name: str
    rows: list[StepRow]
    validations: list[ValidationRow]
    best: Best | None

    @property
    def label(self) -> str:
        """For people: "stage 1"."""
        return stage_label(self.name)

    @property
    def tokens(self) -> int:
        """Tokens it has trained on."""
        return max([row.tokens for row in self.rows] + [row.tokens for row in self.validations], default=0)

    @property
    def best_row(self) -> ValidationRow | None:
        """The validation of the best checkpoint."""
        digits = re.search(r"\d+$", self.best.tag) if self.best else None
        named = [row for row in self.validations if digits and row.step == int(digits.group())]
        flagged = [row for row in self.validations if row.best]
        found = named or flagged
        return found[-1] if found else None


@dataclass(frozen=True)
class RunData:
    """All that a report is made from."""

    folder: Path
    settings_text: str
    settings: Mapping[str, Any]
    similarity: Similarity | None
    plan: ExpertPlan | None
    stages: dict[str, Stage]
    evaluation: Evaluation | None
    manifests: list[StepManifest]
    text: StoreStatistics | None = None

    @property
    def name(self) -> str:
        """The run's name, or its folder's."""
        return str(self.settings.get("name") or self.folder.name)

    @property
    def model(self) -> str:
        """The dense model's path or hub id."""
        return str(_section(self.settings, "model").get("path", "not named"))

    @property
    def base_run(self) -> str:
        """The run that was expanded further; empty where a dense model was."""
        return str(_section(self.settings, "base").get("run", ""))

    @property
    def baseline(self) -> str:
        """The method by which the dense model itself was trained; empty for a mixture of experts."""
        method = self.settings.get("method", "moe")
        name = str(method.get("name")) if isinstance(method, dict) else str(method)
        return "" if name == "moe" else name

    def languages(self, group: Group) -> list[str]:
        """The languages of a group's sets, in the settings' order."""
        sets = _section(_section(self.settings, "data"), group)
        return list(dict.fromkeys(str(_section(sets, name).get("language") or name) for name in sets))

    def set_names(self) -> list[str]:
        """All evaluated or validated sets: new, then old, then watched."""
        known = self.evaluation.sets if self.evaluation else {}
        names = [name for group in GROUPS for name, result in known.items() if result.group == group]
        configured = [name for group in GROUPS for name in _section(_section(self.settings, "data"), group)]
        seen = [name for stage in self.stages.values() for row in stage.validations[:1] for name in row.sets]
        trained = [name for stage in self.stages.values() for row in stage.rows[:1] for name in row.expert_0_share]
        return list(dict.fromkeys([*names, *map(str, configured), *seen, *trained]))


def stage_label(name: str) -> str:
    """A checkpoint's name for people: "stage1" is stage 1; "base", what training started from, is base."""
    return {"stage1": "stage 1", "stage2": "stage 2"}.get(name, name)


def read_run(folder: RunFolder, steps: Sequence[str]) -> RunData:
    """Read everything in a run's folder.

    Args:
        folder: the run's.
        steps: the names of all steps, in order.

    Raises:
        UserError: the folder holds no run, or a file in it is damaged.
    """
    try:
        text = folder.run_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{folder.run_file}: can't be read ({error}); name a run's folder, such as runs/quickstart"
        ) from error
    settings = parse_yaml(text, str(folder.run_file))
    return RunData(
        folder=folder.path,
        settings_text=text,
        settings=settings if isinstance(settings, dict) else {},
        similarity=Similarity.load_if_there(folder / SIMILARITY_FILE),
        plan=ExpertPlan.load(folder / PLAN_FILE) if (folder / PLAN_FILE).is_file() else None,
        stages={name: _read_stage(folder / name) for name in STAGES},
        evaluation=Evaluation.load_if_there(folder / EVALUATION_FILE),
        manifests=list(folder.manifests(steps).values()),
        text=_read_statistics(folder / STATISTICS_FILE),
    )


def _read_statistics(path: Path) -> StoreStatistics | None:
    """Figures of the run's text, which the tokenize step left."""
    try:
        return StoreStatistics.model_validate(read_json(path)) if path.is_file() else None
    except ValidationError as error:
        raise UserError(f"{path}: not the statistics of this version; delete it and run tokenize again") from error


def _section(tree: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = tree.get(key)
    return value if isinstance(value, dict) else {}


def _read_stage(folder: Path) -> Stage:
    return Stage(
        name=folder.name,
        rows=StepRow.load_rows(folder / METRICS_FILE),
        validations=ValidationRow.load_rows(folder / VALIDATION_FILE),
        best=Best.load_if_there(folder / BEST_FILE),
    )
