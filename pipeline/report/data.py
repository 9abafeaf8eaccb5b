"""What a run's folder holds, read and checked; a file that is not there yet is None or empty."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import UserError
from common.files import read_json
from common.yaml_reader import parse_yaml
from data_prep.store import StoreStatistics
from pipeline.model import expert_plan
from pipeline.model.expert_plan import ExpertPlan
from pipeline.training.metrics import METRICS_FILE, VALIDATION_FILE, read_rows

Group = Literal["new", "old", "watch"]
GROUPS: tuple[Group, ...] = ("new", "old", "watch")
STAGES = ("stage1", "stage2")
STEPS = ("tokenize", "similarity", "allocate", "upcycle", *STAGES, "evaluate")


class _Record(BaseModel):
    """A part of a results file: what the report does not show is ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


R = TypeVar("R", bound=_Record)


class Similarity(_Record):
    """``similarity.json``: ``pairs`` maps "a&b" to a value a layer; ``by_layer`` is S_l."""

    old: list[str]
    new: list[str]
    tokens: dict[str, int]
    pairs: dict[str, list[float]]
    by_layer: list[float]


class Change(_Record):
    """Against the dense model, in percent; ``interval`` is None where one document says nothing of spread."""

    percent: float
    interval: float | None


class SetResult(_Record):
    """One set's bits per character by checkpoint."""

    group: Group
    language: str
    documents: int
    characters: int
    bits_per_character: dict[str, float]
    change: dict[str, Change] = {}


class Shares(_Record):
    """Of one set's tokens, a layer with a router: share on expert 0, mean G_0, share classified as old."""

    share_0: list[float]
    probability_0: list[float]
    classified_old: list[float] = []


class StageRouting(_Record):
    """How one checkpoint routes held-out text; ``layers`` are the decoder layers that have a router."""

    layers: list[int]
    sets: dict[str, Shares]


class Evaluation(_Record):
    """``evaluation.json``."""

    window: int
    checkpoints: list[str]
    sets: dict[str, SetResult]
    routing: dict[str, StageRouting] = {}
    parameters: dict[str, int] = {}


class StepRow(_Record):
    """A row of ``metrics.jsonl``: one optimizer step."""

    step: int
    tokens: int
    loss: dict[str, float]
    expert_0_share: dict[str, float] = {}
    load_imbalance: list[float] = []
    lr: float
    grad_norm: float | None = None
    tokens_per_second: float
    seconds: float


class ValidationRow(_Record):
    """A row of ``validation.jsonl``: bits per character by set."""

    step: int
    tokens: int
    sets: dict[str, float]
    mean: float
    best: bool


class Best(_Record):
    """``best.json``: the checkpoint that validated best."""

    tag: str
    bits_per_character: float


class Manifest(_Record):
    """``manifests/STEP.json`` of a finished step."""

    step: str
    figures: dict[str, Any] = {}
    versions: dict[str, str] = {}


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
    manifests: list[Manifest]
    text: StoreStatistics | None = None

    @property
    def name(self) -> str:
        """The run's name, or its folder's."""
        return str(self.settings.get("name") or self.folder.name)

    @property
    def model(self) -> str:
        """The dense model's path or hub id."""
        return str(_section(self.settings, "model").get("path", "not named"))

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
    """A checkpoint's name for people: "base" is the dense model, "stage1" is stage 1."""
    return {"base": "dense", "stage1": "stage 1", "stage2": "stage 2"}.get(name, name)


def read_run(folder: Path) -> RunData:
    """Read everything in a run's folder.

    Raises:
        UserError: the folder holds no run, or a file in it is damaged.
    """
    settings_path = folder / "run.yaml"
    try:
        text = settings_path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{settings_path}: can't be read ({error}); name a run's folder, such as runs/quickstart"
        ) from error
    settings = parse_yaml(text, str(settings_path))
    plan_path = folder / expert_plan.FILE_NAME
    return RunData(
        folder=folder,
        settings_text=text,
        settings=settings if isinstance(settings, dict) else {},
        similarity=_read(folder / "similarity.json", Similarity),
        plan=ExpertPlan.load(plan_path) if plan_path.is_file() else None,
        stages={name: _read_stage(folder / name) for name in STAGES},
        evaluation=_read(folder / "evaluation.json", Evaluation),
        manifests=_read_manifests(folder / "manifests"),
        text=_read_statistics(folder / "data_statistics.json"),
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


def _checked(value: Any, kind: type[R], where: str) -> R:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise UserError(f"{where}: {key}: {problem['msg']}; delete the file and run its step again") from error


def _read(path: Path, kind: type[R]) -> R | None:
    return _checked(read_json(path), kind, str(path)) if path.is_file() else None


def _read_lines(path: Path, kind: type[R]) -> list[R]:
    return [_checked(row, kind, f"{path}, row {number}") for number, row in enumerate(read_rows(path), start=1)]


def _read_stage(folder: Path) -> Stage:
    return Stage(
        name=folder.name,
        rows=_read_lines(folder / METRICS_FILE, StepRow),
        validations=_read_lines(folder / VALIDATION_FILE, ValidationRow),
        best=_read(folder / "best.json", Best),
    )


def _read_manifests(folder: Path) -> list[Manifest]:
    """In the order of the pipeline's steps."""
    found = [manifest for path in sorted(folder.glob("*.json")) if (manifest := _read(path, Manifest))]
    return sorted(found, key=lambda m: STEPS.index(m.step) if m.step in STEPS else len(STEPS))
