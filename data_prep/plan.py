"""The plan of a preparation: every setting and slice that its result depends on, and the folder it is worked out in.

A document's key is (slice, row in the slice); slices are numbered in the order of sets, sources and files. The plan
lies in the work folder, so that any process on any machine can do any task of it.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from common.files import read_json, write_json
from data_prep.config import DataConfig, SetConfig
from data_prep.reading.documents import Reading
from data_prep.reading.file_splits import Piece
from data_prep.tokenizer import TokenizerSpec

ROW_BITS = 32
Group = Literal["old", "new", "watch", "benchmark"]
Json = dict[str, Any]


@dataclass(frozen=True)
class Slice:
    """What one task reads. `source` is the source's number in its set; `number` the slice's in the whole plan."""

    number: int
    group: Group
    name: str
    source: int
    pieces: list[Piece]

    @property
    def size(self) -> int:
        """About its bytes of text."""
        return sum(piece.size for piece in self.pieces)

    @property
    def trains(self) -> bool:
        """Whether it has training documents."""
        return self.group in ("old", "new")


@dataclass(frozen=True)
class Replay:
    """The most that one old set gives to training."""

    tokens: int | None = None
    characters: int | None = None


@dataclass(frozen=True)
class Plan:
    """All of it. `fraction` is what is held out; `replay` is by old set, where there is a budget."""

    data: DataConfig
    seed: int
    fraction: float
    dtype: Literal["uint16", "int32"]
    tokenizer: TokenizerSpec
    replay: dict[str, Replay]
    slices: list[Slice]
    info: Json  # what the manifest says besides: key, tokenizer, settings, versions, files by set

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        value = {key: getattr(self, key) for key in ("seed", "fraction", "dtype", "info")}
        value["data"] = self.data.model_dump(mode="json")
        value["tokenizer"] = asdict(self.tokenizer)
        value["replay"] = {name: asdict(budget) for name, budget in self.replay.items()}
        value["slices"] = [asdict(part) for part in self.slices]
        write_json(path, value)

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Read what `save` wrote."""
        value = read_json(path)
        slices = [
            Slice(**{**part, "pieces": [Piece(**piece) for piece in part["pieces"]]}) for part in value["slices"]
        ]
        return cls(
            DataConfig.model_validate(value["data"]),
            value["seed"],
            value["fraction"],
            value["dtype"],
            TokenizerSpec(**value["tokenizer"]),
            {name: Replay(**budget) for name, budget in value["replay"].items()},
            slices,
            value["info"],
        )

    def entry(self, part: Slice) -> SetConfig:
        """The settings of a slice's set; of a benchmark, of one that is never filtered."""
        if part.group == "benchmark":
            return SetConfig(path=".", language=part.name)
        return self.data.sets[part.name]

    def reading(self, part: Slice) -> Reading:
        """How a slice's rows become documents."""
        if part.group == "benchmark":
            source = self.data.benchmarks[part.name]
        else:
            source = self.data.sets[part.name].source_list[part.source]
        by = self.data.held_out.by
        return Reading(
            source.text_field,
            None if by == "document" or part.group == "benchmark" else by,
            part.trains,
            self.data.max_document_bytes,
            self.data.bad_rows == "skip",
        )

    def slices_of(self, name: str, source: int | None = None) -> list[Slice]:
        """A set's slices, or those of one of its sources."""
        return [s for s in self.slices if s.group != "benchmark" and s.name == name and source in (None, s.source)]

    @property
    def finds_copies(self) -> bool:
        """Whether training documents are compared with held-out ones."""
        return self.data.held_out.near_copy_threshold is not None

    @property
    def filters_first(self) -> bool:
        """Whether anything must be known of all documents before the first is tokenized."""
        filters = self.data.filters
        return self.finds_copies or bool(self.replay) or filters != type(filters)()


@dataclass(frozen=True)
class Work:
    """The folder that a plan is worked out in."""

    folder: Path

    @cached_property
    def plan(self) -> Plan:
        """The plan, read once a process."""
        return _plan(self.folder)

    @property
    def is_finished(self) -> bool:
        """Whether the store is there: another job that shares the work has finished it."""
        name = self.folder.name.removeprefix(".").removesuffix(".work")
        return self.folder.name != name and (self.folder.with_name(name) / "manifest.json").is_file()

    def marker(self, phase: str, task: int) -> Path:
        """The file that says that a task is done, with its figures."""
        return self.folder / "done" / phase / f"{task:06d}.json"

    def figures(self, phase: str, task: int) -> Json:
        """What a finished task found."""
        found: Json = read_json(self.marker(phase, task))
        return found

    def path(self, phase: str, task: int, suffix: str) -> Path:
        """Where a task keeps a result."""
        return self.folder / phase / f"{task:06d}{suffix}"


@lru_cache(maxsize=4)
def _plan(folder: Path) -> Plan:
    return Plan.load(folder / "plan.json")


def forget_plans() -> None:
    """Read plans again: the folder of one may hold another now."""
    for forget in _FORGET:
        forget()


_FORGET: list[Callable[[], object]] = [_plan.cache_clear]


def forgettable(forget: Callable[[], object]) -> None:
    """Have something else that was kept of a work folder forgotten with its plan."""
    _FORGET.append(forget)


def seeded(seed: int, name: str, numbers: list[int]) -> list[int]:
    """Slices in a random order that depends on the seed and `name` alone."""

    def place(position: int) -> bytes:
        return hashlib.blake2b(f"{seed}\0{name}\0{position}".encode(), digest_size=8).digest()

    return [numbers[position] for position in sorted(range(len(numbers)), key=place)]


def keys_of(part: int, rows: NDArray[np.integer]) -> NDArray[np.uint64]:
    """Keys of a slice's documents: their order is the order of (slice, row)."""
    return (np.uint64(part) << np.uint64(ROW_BITS)) | rows.astype(np.uint64)


def check_disk(error: OSError) -> UserError:
    """The line for a write that failed."""
    return UserError(f"{error.filename or 'disk'}: can't be written ({error.strerror}); make room and run it again")
