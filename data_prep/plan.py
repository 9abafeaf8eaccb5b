"""The plan of a preparation: which sets are read and written, and all that the result depends on.

A document's key is (slice, row in the slice); slices are numbered in the order of sets, sources and files. The plan
lies in the work folder, so that any process on any machine can do any task of it.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from common.files import json_text, read_json, write_once
from data_prep.config import DataConfig, FiltersConfig, SetConfig
from data_prep.reading.documents import Reading
from data_prep.reading.file_splits import FileSplit
from data_prep.tokenizer import TokenizerSpec

ROW_BITS = 32
FILTER, TOKENIZE = "filter", "tokenize"  # the phases whose results other phases read
CHANGED, HELD_OUT = 1, 2  # flags of a document that the filters keep
UNITS = ("documents", "tokens", "characters")  # what a budget limits
Group = Literal["old", "new", "watch", "benchmark"]
Json = dict[str, Any]
Slices = list[tuple[int, list[FileSplit]]]  # for each slice the number of its source, and its splits


@dataclass(frozen=True)
class Budget:
    """The most that is taken of each unit; None is no limit."""

    documents: int | None = None
    tokens: int | None = None
    characters: int | None = None

    @property
    def limits(self) -> dict[str, int]:
        """Those that are set, by unit."""
        return {unit: limit for unit in UNITS if (limit := getattr(self, unit)) is not None}

    def within(self, other: "Budget | None") -> "Budget":
        """What satisfies both."""
        limits = [self.limits, other.limits if other is not None else {}]
        units = {unit for part in limits for unit in part}
        return Budget(**{unit: min(part[unit] for part in limits if unit in part) for unit in units})


@dataclass(frozen=True)
class Slice:
    """What one task reads.

    Attributes:
        number: its number in the plan.
        set: the number of its set in the plan.
        place: its number in the set.
        source: the number of its source in the set.
        splits: the parts of files that it holds.
    """

    number: int
    set: int
    place: int
    source: int
    splits: list[FileSplit]

    @property
    def size(self) -> int:
        """About its bytes of text."""
        return sum(split.size for split in self.splits)


class FoundSet(NamedTuple):
    """A set as it was found: see `SetPlan`. `slices` are all of its text, `read` those that its budgets need."""

    name: str
    group: Group
    entry: SetConfig
    files: list[Json]
    slices: Slices
    read: Slices


@dataclass(frozen=True)
class SetPlan:
    """One set as a run wants it; a benchmark is a set of which only the word runs are kept.

    Attributes:
        name, group: what the run calls it; for messages.
        entry: its settings.
        replay: its part of the run's replay, if it has one.
        corpus: the key of its text with what says which documents are held out.
        text: the same, of the slices that are read.
        key, settings: its key, and what the key is made of.
        files: what its manifest says of its files: path, sha256, bytes, source.
        slices: for each slice that is read the number of its source, and its splits.
        is_written: whether it is prepared; else it is only read, to find copies of its documents in other sets.
    """

    name: str
    group: Group
    entry: SetConfig
    replay: Budget | None
    corpus: str
    text: str
    key: str
    settings: Json
    files: list[Json]
    slices: Slices
    is_written: bool = True

    @property
    def trains(self) -> bool:
        """Whether it has training documents."""
        return self.group in ("old", "new")

    @property
    def where(self) -> str:
        """Its key in the run's YAML."""
        return f"data.{'benchmarks' if self.group == 'benchmark' else self.group}.{self.name}"

    @property
    def budget(self) -> Budget:
        """The most that it gives to training: its own caps, and its part of replay."""
        return Budget(*self.entry.caps).within(self.replay) if self.trains else Budget()


@dataclass(frozen=True)
class HeldOutText:
    """The held-out text of one set, which no training document may copy.

    Attributes:
        text: the set's `SetPlan.text`.
        is_benchmark: whether the set is one.
        key: the set's key; its folder holds the word runs, unless the plan reads the set.
    """

    text: str
    is_benchmark: bool
    key: str


@dataclass(frozen=True)
class KeptSet:
    """A training set that is kept although it was not cleaned of some held-out texts: its copies are counted.

    Attributes:
        key: the set's key.
        shards: its training shards, by their names in its folder.
        texts: the numbers in `Plan.held_out_texts` of those texts.
        record: the name of the file that keeps the count.
    """

    key: str
    shards: list[str]
    texts: list[int]
    record: str


@dataclass(frozen=True)
class Plan:
    """All of it.

    Attributes:
        seed: of what is held out, of what budgets take, and of replay.
        fraction: the share of pages that is held out.
        dtype: of the shards.
        tokenizer, tokenizer_name: what encodes, and where it came from.
        sets: the sets that are read.
        held_out_texts: what training documents are compared with; none where they are not.
        kept: the sets whose copies are counted.
        versions: of the packages, for the manifests.
        own_tokenizer: the model's own, where ``tokenizer`` extends it: held-out text is encoded by it too.
    """

    data: DataConfig
    seed: int
    fraction: float
    dtype: Literal["uint16", "int32"]
    tokenizer: TokenizerSpec
    tokenizer_name: str
    sets: list[SetPlan]
    held_out_texts: list[HeldOutText] = field(default_factory=list)
    kept: list[KeptSet] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    own_tokenizer: TokenizerSpec | None = None

    def save(self, path: Path) -> None:
        """Write it as JSON, unless another process has been first: all follow the plan that is there."""
        write_once(path, json_text(_ADAPTER.dump_python(self, mode="json")).encode())

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Read what `save` wrote."""
        return _ADAPTER.validate_python(read_json(path))

    @cached_property
    def slices(self) -> list[Slice]:
        """Every slice, by number."""
        found: list[Slice] = []
        for number, one in enumerate(self.sets):
            for place, (source, splits) in enumerate(one.slices):
                found.append(Slice(len(found), number, place, source, splits))
        return found

    def set_of(self, part: Slice) -> SetPlan:
        """The set that a slice is of."""
        return self.sets[part.set]

    def slices_of(self, number: int, source: int | None = None) -> list[Slice]:
        """A set's slices, or those of one of its sources."""
        return [part for part in self.slices if part.set == number and source in (None, part.source)]

    def reading(self, part: Slice) -> Reading:
        """How a slice's rows become documents."""
        return reading_of(self.data, self.set_of(part), part.source)

    @property
    def writes_training_text(self) -> bool:
        """Whether any set is written that is trained on."""
        return any(one.trains and one.is_written for one in self.sets)

    def is_filtered_first(self, one: SetPlan) -> bool:
        """Whether all documents of a set are read before the first is tokenized; else they are read once."""
        copies = self.data.held_out.near_copy_threshold is not None
        filters = self.data.filters != FiltersConfig()
        return not one.trains or copies or filters or one.replay is not None

    @property
    def finds_duplicates(self) -> bool:
        """Whether training documents are compared with each other."""
        return self.data.filters.duplicates and self.writes_training_text

    @property
    def finds_copies(self) -> bool:
        """Whether training documents are compared with held-out ones."""
        return bool(self.held_out_texts) and (self.writes_training_text or bool(self.kept))


_ADAPTER = TypeAdapter(Plan)


def reading_of(data: DataConfig, one: SetPlan | FoundSet, source: int) -> Reading:
    """How the rows of one of a set's sources become documents."""
    by = data.held_out.by
    return Reading(
        one.entry.source_list[source].text_field,
        None if by == "document" or one.group == "benchmark" else by,
        one.group in ("old", "new"),
        data.max_document_bytes,
        data.bad_rows == "skip",
    )


def keys_of(part: int, rows: NDArray[np.integer]) -> NDArray[np.uint64]:
    """Keys of a slice's documents: their order is the order of (slice, row)."""
    return (np.uint64(part) << np.uint64(ROW_BITS)) | rows.astype(np.uint64)
