"""The first phase: every document of a slice is read, held out or not, filtered and signed."""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from common.files import save_array
from data_prep.config import FiltersConfig
from data_prep.dedup.held_out import SHINGLE, HeldOutRuns, is_held_out
from data_prep.dedup.minhash import Signatures
from data_prep.dedup.word_shingles import Hashes, shingles, word_hashes
from data_prep.filters import Filters
from data_prep.manifest import RUN_SIZES, RUNS
from data_prep.plan import CHANGED, FILTER, HELD_OUT, Json, Plan, SetPlan, Slice
from data_prep.reading.documents import EXAMPLES, BadRows, Document, read_documents
from data_prep.work import Work

RUNS_PHASE = "held_out_runs"


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
        """By reason: "documents", "characters", and the places of the first as "examples"."""
        return {
            reason: {
                "documents": self.documents[reason],
                "characters": self.characters[reason],
                "examples": self.examples[reason],
            }
            for reason in sorted(self.documents)
        }


def filters_of(work: Work, part: Slice) -> Filters:
    """The filters of a slice's set, made once a process; what is not trained on is not filtered."""
    one = work.plan.set_of(part)

    def make() -> Filters:
        return Filters(work.plan.data.filters if one.trains else FiltersConfig(), one.entry, one.name)

    return work.once(("filters", part.set), make)


def holds_out(seed: int, fraction: float, one: SetPlan, document: Document) -> bool:
    """Whether a document of a set, as its source has it, is held out.

    Of training sets this fraction of pages is, unless a set has its own.
    """
    if not one.trains:
        return True
    key = document.text if document.page is None else document.page
    return is_held_out(key, seed, one.entry.held_out_share(fraction))


def watched_documents(plan: Plan, part: Slice) -> int | None:
    """How many documents a slice gives at most, if its set is to watch and has a cap: each slice gives as many."""
    one = plan.set_of(part)
    if one.group != "watch" or one.entry.max_documents is None:
        return None
    return math.ceil(one.entry.max_documents / len(one.slices))


@dataclass
class _Kept:
    rows: list[int] = field(default_factory=list)
    flags: list[int] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)
    held_out_runs: list[Hashes] = field(default_factory=list)


def filter_slice(work: Work, number: int) -> Json:
    """Write what is kept of a slice, the runs of its held-out texts, and the others' signatures.

    Returns:
        "dropped" (by reason), "held_out" (documents and characters), "signed" (documents) and "bad_rows" (rows and
        examples).
    """
    plan, part = work.plan, work.plan.slices[number]
    one, filters, near = plan.set_of(part), filters_of(work, part), plan.data.filters.near_duplicates
    signatures = Signatures(near) if one.trains and plan.finds_duplicates else None
    drops, bad_rows, kept = Drops(), BadRows(), _Kept()
    most = watched_documents(plan, part)
    for document in read_documents(part.splits, plan.reading(part), bad_rows):
        text, changed, reason = filters.apply(document.text)
        if reason is not None:
            drops.add(reason, document)
            continue
        if len(kept.rows) == most:
            break
        held_out = holds_out(plan.seed, plan.fraction, one, document)
        kept.rows.append(document.index)
        kept.flags.append(CHANGED * changed | HELD_OUT * held_out)
        kept.characters.append(len(text))
        if held_out:
            kept.held_out_runs.append(shingles(word_hashes(text), SHINGLE))
        elif signatures is not None:
            signatures.add(document.index, text, word_hashes(text) if near else None)
    _save(work, number, kept)
    if signatures is not None:
        hashes, rows, low = signatures.arrays()
        for suffix, values in ((".hashes.npy", hashes), (".rows.npy", rows), (".low.npy", low)):
            save_array(work.path("signatures", number, suffix), values)
    held = [size for size, flag in zip(kept.characters, kept.flags, strict=True) if flag & HELD_OUT]
    return {
        "dropped": drops.as_json(),
        "held_out": {"documents": len(held), "characters": sum(held)},
        "signed": len(kept.rows) - len(held) if signatures is not None else 0,
        "bad_rows": bad_rows.as_json(),
    }


def _save(work: Work, number: int, kept: _Kept) -> None:
    save_array(work.path(FILTER, number, ".rows.npy"), np.array(kept.rows, np.uint32))
    save_array(work.path(FILTER, number, ".flags.npy"), np.array(kept.flags, np.uint8))
    save_array(work.path(FILTER, number, ".characters.npy"), np.array(kept.characters, np.uint32))
    sizes = np.array([len(runs) for runs in kept.held_out_runs], np.uint32)
    save_array(work.path(RUNS_PHASE, number, ".sizes.npy"), sizes)
    save_array(
        work.path(RUNS_PHASE, number, ".runs.npy"), np.concatenate([np.empty(0, np.uint64), *kept.held_out_runs])
    )


def runs_of_set(work: Work, number: int) -> HeldOutRuns:
    """The word runs of all held-out texts of a set that the plan reads, in the order of its slices."""
    parts = [part.number for part in work.plan.slices_of(number)]
    if not work.plan.is_filtered_first(work.plan.sets[number]):  # nothing is compared with its held-out text
        parts = []
    runs = [np.load(work.path(RUNS_PHASE, part, ".runs.npy")) for part in parts]
    sizes = [np.load(work.path(RUNS_PHASE, part, ".sizes.npy")) for part in parts]
    return HeldOutRuns(
        np.concatenate([np.empty(0, np.uint64), *runs]), np.concatenate([np.empty(0, np.uint32), *sizes])
    )


def held_out_runs(work: Work) -> Iterator[HeldOutRuns]:
    """The word runs of each of the plan's held-out texts, in their order, from this work or from the cache."""
    read = {one.text: number for number, one in enumerate(work.plan.sets)}
    for held_out in work.plan.held_out_texts:
        if held_out.text in read:
            yield runs_of_set(work, read[held_out.text])
        else:
            folder = work.tokens / held_out.key
            yield HeldOutRuns(np.load(folder / RUNS), np.load(folder / RUN_SIZES))
