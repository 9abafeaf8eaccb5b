"""A sweep's YAML: its base, what each of its runs changes, and the seeds."""

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import field_validator, model_validator

from common.errors import UserError
from common.section import Section
from common.settings import load_settings, parse_settings, read_tree, set_key
from pipeline.config.run import RunConfig

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
# Keys that no run of a sweep sets: what each is told apart by, and what all of them share.
_DERIVED = {
    "name": "is made from the base's name, the run's and the seed; leave it out",
    "output_dir": "is the base's for all runs; change it there",
    "cache_dir": "is the base's for all runs, so that they share it; change it there",
    "seed": "is given by seeds: [17, 18]; leave it out here",
}


class SweepConfig(Section):
    """The whole file.

    ``base`` is a run's YAML. ``runs`` maps a name to what that run changes, by dotted keys: ``{stage1.lr: 1e-4}``;
    ``{}`` is the base itself. With ``seeds`` there is a run for each of them too; they share their text, which
    ``data.seed`` chooses: it is the base's seed unless the base or a run gives it.
    """

    base: Path
    runs: dict[str, dict[str, Any]]
    seeds: list[int] = []

    @field_validator("runs", mode="before")
    @classmethod
    def _nothing_is_no_change(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {str(name): {} if changes is None else changes for name, changes in value.items()}

    @model_validator(mode="after")
    def _check(self) -> "SweepConfig":
        if not self.runs:
            raise ValueError("runs: no run; name at least one, as runs: {low: {stage1.lr: 1e-4}}")
        for name in self.runs:
            if not _NAME.match(name):
                raise ValueError(f"runs.{name}: the name becomes part of a folder's; use letters, digits, - and _")
        if len(set(self.seeds)) < len(self.seeds) or any(seed < 0 for seed in self.seeds):
            raise ValueError(f"seeds: {self.seeds} are not different numbers from 0 on; write seeds: [17, 18, 19]")
        return self


@dataclass(frozen=True)
class Sweep:
    """A sweep that has been read.

    Attributes:
        name: of the file, without its ending.
        base: the run that all others are made from.
        runs: all of them, in the order of seeds, then of the file: what is done can be compared early.
    """

    name: str
    base: RunConfig
    runs: list[RunConfig]

    @property
    def comparison(self) -> Path:
        """Where the comparison of its runs goes."""
        return self.base.output_dir / f"compare-{self.name}"


def read_sweep(path: Path) -> Sweep:
    """Read a sweep and check each of its runs.

    Raises:
        UserError: a line for each mistake, naming the file, the run and the key.
    """
    config = load_settings(SweepConfig, path)
    tree = read_tree(config.base)
    base = parse_settings(RunConfig, copy.deepcopy(tree), str(config.base))
    seeds: list[int | None] = [*config.seeds] or [None]
    runs = [
        _make_run(path, base, tree, name, changes, seed) for seed in seeds for name, changes in config.runs.items()
    ]
    return Sweep(path.stem, base, runs)


def _make_run(
    path: Path, base: RunConfig, tree: dict[str, Any], name: str, changes: dict[str, Any], seed: int | None
) -> RunConfig:
    """The base with a run's changes and a seed; None leaves the base's seed."""
    where, tree = f"{path}: runs.{name}", copy.deepcopy(tree)
    derived: dict[str, str | int] = {"name": f"{base.name}-{name}"}
    if seed is not None:
        derived = {"name": f"{base.name}-{name}-seed{seed}", "seed": seed}
        if base.data.seed is None:
            derived["data.seed"] = base.seed
    for key, value in derived.items():
        set_key(tree, key, value, where)
    for key, value in changes.items():
        if key in _DERIVED:
            raise UserError(f"{where}: {key} {_DERIVED[key]}")
        if not all(str(key).split(".")):
            raise UserError(f"{where}: {key!r} is not a key; write it as stage1.lr")
        set_key(tree, str(key), value, f"{where}: {key}")
    return parse_settings(RunConfig, tree, where)
