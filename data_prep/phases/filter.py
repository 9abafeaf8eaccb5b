"""The first phase: every document of a slice is read, held out or not, filtered and signed."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.files import atomic_file
from data_prep.config import FiltersConfig
from data_prep.dedup.held_out import SHINGLE, HeldOutRuns, is_held_out
from data_prep.dedup.minhash import Signatures
from data_prep.dedup.word_shingles import Hashes, shingles, word_hashes
from data_prep.filters import Filters
from data_prep.plan import Json, Plan, Slice, Work, forgettable
from data_prep.reading.documents import EXAMPLES, BadRows, Document, read_documents

PHASE = "filter"
CHANGED, HELD_OUT = 1, 2  # flags of a kept document


@dataclass
class Drops:
    """What was dropped, by reason."""

    documents: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    characters: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, reason: str, document: Document) -> None:
        """Count one."""
        self.documents[reason] += 1
        self.characters[reason] += len(document.text)
        if len(self.examples[reason]) < EXAMPLES:
            self.examples[reason].append(document.place)

    def as_json(self) -> Json:
        """By reason: documents, characters, examples."""
        return {
            reason: {
                "documents": self.documents[reason],
                "characters": self.characters[reason],
                "examples": self.examples[reason],
            }
            for reason in sorted(self.documents)
        }


@lru_cache(maxsize=64)
def filters_of(plan_folder: Any, part_name: str, group: str) -> Filters:
    """The filters of a set, made once a process."""
    plan = Work(plan_folder).plan
    config = plan.data.filters if group in ("old", "new") else FiltersConfig()
    return Filters(config, next(plan.entry(s) for s in plan.slices if s.name == part_name), part_name)


forgettable(filters_of.cache_clear)


def holds_out(plan: Plan, part: Slice, document: Document) -> bool:
    """Whether a document, as its source has it, is held out."""
    if not part.trains:
        return True
    key = document.text if document.page is None else document.page
    return is_held_out(key, plan.seed, plan.fraction)


@dataclass
class _Kept:
    rows: list[int] = field(default_factory=list)
    flags: list[int] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)
    held_out_runs: list[Hashes] = field(default_factory=list)


def filter_slice(work: Work, number: int) -> Json:
    """Write what is kept of a slice, the runs of its held-out texts, and the others' signatures."""
    plan, part = work.plan, work.plan.slices[number]
    filters = filters_of(work.folder, part.name, part.group)
    near = plan.data.filters.near_duplicates
    signatures = Signatures(near) if part.trains and plan.data.filters.duplicates else None
    drops, bad_rows, kept = Drops(), BadRows(), _Kept()
    seen = {"documents": 0, "characters": 0}
    for document in read_documents(part.pieces, plan.reading(part), bad_rows):
        seen["documents"] += 1
        seen["characters"] += len(document.text)
        text, changed, reason = filters.apply(document.text)
        if reason is not None:
            drops.add(reason, document)
            continue
        held_out = holds_out(plan, part, document)
        kept.rows.append(document.index)
        kept.flags.append(CHANGED * changed | HELD_OUT * held_out)
        kept.characters.append(len(text))
        if held_out:
            if plan.finds_copies:
                kept.held_out_runs.append(shingles(word_hashes(text), SHINGLE))
        elif signatures is not None:
            signatures.add(document.index, text, word_hashes(text) if near else None)
    _save(work, number, kept, part)
    if signatures is not None:
        hashes, rows, low = signatures.arrays()
        for suffix, values in ((".hashes.npy", hashes), (".rows.npy", rows), (".low.npy", low)):
            save_array(work, "signatures", number, suffix, values)
    figures: Json = {"seen": seen, "dropped": drops.as_json(), "kept": len(kept.rows)}
    figures["bad_rows"] = {"rows": bad_rows.count, "examples": bad_rows.examples}
    figures["signed"] = sum(not flag & HELD_OUT for flag in kept.flags) if signatures is not None else 0
    return figures


def _save(work: Work, number: int, kept: _Kept, part: Slice) -> None:
    save_array(work, PHASE, number, ".rows.npy", np.array(kept.rows, np.uint32))
    save_array(work, PHASE, number, ".flags.npy", np.array(kept.flags, np.uint8))
    save_array(work, PHASE, number, ".characters.npy", np.array(kept.characters, np.uint32))
    if kept.held_out_runs:
        sizes = np.array([len(runs) for runs in kept.held_out_runs], np.uint32)
        save_array(work, "held_out_runs", number, ".sizes.npy", sizes)
        save_array(work, "held_out_runs", number, ".runs.npy", np.concatenate(kept.held_out_runs))


def save_array(work: Work, phase: str, number: int, suffix: str, values: NDArray[np.generic]) -> None:
    """Write a task's array, whole or not at all."""
    with atomic_file(work.path(phase, number, suffix)) as temporary, open(temporary, "wb") as file:
        np.save(file, values)


def held_out_runs(work: Work) -> Iterator[HeldOutRuns]:
    """What `filter_slice` wrote of held-out texts, slice by slice."""
    for part in work.plan.slices:
        path = work.path("held_out_runs", part.number, ".sizes.npy")
        if path.is_file():
            sizes = np.load(path)
            runs = np.load(work.path("held_out_runs", part.number, ".runs.npy"))
            yield HeldOutRuns(runs, sizes, np.full(len(sizes), part.group == "benchmark"))
