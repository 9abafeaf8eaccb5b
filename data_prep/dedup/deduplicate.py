"""Deduplication from signatures to the rows that each slice loses: joins, then components, then lists by slice."""

import shutil

import numpy as np

from common.errors import UserError
from common.files import save_array
from data_prep.dedup.connected_components import EDGES_A_PIECE, large_star, not_smallest, small_star
from data_prep.dedup.signature_join import EDGES, join_range, num_columns, num_ranges
from data_prep.executor.pool import Executor, Phase
from data_prep.plan import FILTER, ROW_BITS, Json, Slice
from data_prep.work import Work

DOCUMENTS_A_GROUP = 1 << 20  # whose edges one task ties
MOST_ROUNDS = 64  # log2 of any number of documents; the algorithm needs a few


def deduplicate(work: Work, executor: Executor) -> None:
    """Find which documents are copies of an earlier one; what is done already is not done again."""
    ranges = num_ranges(work)
    joins = list(range(num_columns(work) * ranges))
    executor.run(Phase(work, "join", join_range, joins, {"ranges": ranges}, "find duplicates"))
    groups = list(range(len(_groups(work))))
    source = EDGES
    for number in range(MOST_ROUNDS):
        changed = 0
        for kind in ("large_star", "small_star"):
            name = f"{kind}_{number:02d}"
            executor.run(Phase(work, name, star, groups, {"source": source, "target": name}, "join duplicates"))
            changed += sum(work.figures(name, group)["changed"] for group in groups)
            if source != EDGES and executor.is_alone:
                shutil.rmtree(work.folder / source, ignore_errors=True)  # else the disk would hold every round's edges
            source = name
        if not changed:
            break
    else:
        raise UserError(f"{work.folder}: copies could not be joined in {MOST_ROUNDS} rounds; delete it and run again")
    executor.run(Phase(work, "survivors", list_duplicates, groups, {"source": source}, "list duplicates"))


def star(work: Work, task: int, source: str, target: str) -> Json:
    """A task of a star phase, which ties the documents of one group of slices: see `large_star` and `small_star`."""
    function = large_star if target.startswith("large") else small_star
    figures = function(work.folder / source, work.folder / target, task, *_range(work, task))
    (work.folder / target).mkdir(exist_ok=True)  # also where there is no edge: the next step looks for it
    return figures


def list_duplicates(work: Work, task: int, source: str) -> Json:
    """Write the keys that a group of slices loses, and which are exact copies; returns how many are "dropped"."""
    low, high = _range(work, task)
    dropped = not_smallest(work.folder / source, low, high)
    exact = [np.empty(0, np.uint64)]
    for number in range(num_ranges(work)):  # the first column's joins
        edges = np.load(work.folder / EDGES / f"{number:06d}.down.npy", mmap_mode="r")[:, 0]
        begin, end = np.searchsorted(edges, np.array([low, high], np.uint64), "left")
        for start in range(int(begin), int(end), EDGES_A_PIECE):
            exact.append(np.unique(edges[start : min(int(end), start + EDGES_A_PIECE)]))
    save_array(work.path("survivors", task, ".dropped.npy"), dropped)
    save_array(work.path("survivors", task, ".exact.npy"), np.isin(dropped, np.concatenate(exact)))
    return {"dropped": len(dropped)}


def dropped_of(work: Work, part: Slice) -> dict[int, str]:
    """The rows of a slice that are copies of an earlier document, and of which kind."""
    task = next(i for i, (first, last) in enumerate(_groups(work)) if first <= part.number <= last)
    keys = np.load(work.path("survivors", task, ".dropped.npy"), mmap_mode="r")
    bounds = np.array([part.number << ROW_BITS, (part.number + 1) << ROW_BITS], np.uint64)
    begin, end = np.searchsorted(keys, bounds, "left")
    exact = np.load(work.path("survivors", task, ".exact.npy"), mmap_mode="r")[begin:end]
    rows = keys[begin:end] & np.uint64((1 << ROW_BITS) - 1)
    kinds = ("near_duplicate", "exact_duplicate")
    return {int(row): kinds[bool(is_exact)] for row, is_exact in zip(rows, exact, strict=True)}


def _groups(work: Work) -> list[tuple[int, int]]:
    """First and last number of neighbouring slices that together have about DOCUMENTS_A_GROUP documents."""
    return work.once("groups", lambda: _grouped(work))


def _grouped(work: Work) -> list[tuple[int, int]]:
    groups: list[tuple[int, int]] = []
    count = DOCUMENTS_A_GROUP
    for part in work.plan.slices:
        signed = work.figures(FILTER, part.number)["signed"]
        if count + signed > DOCUMENTS_A_GROUP:
            groups.append((part.number, part.number))
            count = 0
        groups[-1] = (groups[-1][0], part.number)
        count += signed
    return groups


def _range(work: Work, task: int) -> tuple[int, int]:
    first, last = _groups(work)[task]
    return first << ROW_BITS, (last + 1) << ROW_BITS
