"""Which documents carry the same signature: the slices' sorted signatures joined by ranges of hashes, on disk.

A task joins one range of one column of hashes over all slices, and writes an edge from each document to the first of
those it equals. How many ranges there are depends on the number of documents, so a task's memory does not.
"""

import numpy as np
from numpy.typing import NDArray

from data_prep.dedup.connected_components import save_edges
from data_prep.plan import FILTER, Json, Slice, keys_of
from data_prep.work import Work

EDGES = "edges"  # the folder of what the joins find
DOCUMENTS_A_TASK = 1 << 20  # 12 bytes each to read, and as much again a few times to sort

Keys = NDArray[np.uint64]


def num_columns(work: Work) -> int:
    """Columns of hashes: the exact text's, and one per MinHash band."""
    near = work.plan.data.filters.near_duplicates
    return 1 + (near.bands if near is not None else 0)


def num_ranges(work: Work) -> int:
    """How many ranges a column is joined in."""
    signed = sum(work.figures(FILTER, part.number)["signed"] for part in _signed(work))
    return max(1, -(-signed // DOCUMENTS_A_TASK))


def _signed(work: Work) -> list[Slice]:
    """The slices of training sets: their documents have signatures."""
    return [part for part in work.plan.slices if work.plan.set_of(part).trains]


def join_range(work: Work, task: int, ranges: int) -> Json:
    """Task `column * ranges + range`: the edges of one range of one column; returns how many "edges" there are."""
    column, number = divmod(task, ranges)
    hashes, keys, low = _read(work, column, number, ranges)
    order = np.argsort(hashes, kind="stable")  # slices come in order, so equal hashes stay in the order of keys
    hashes, keys, low = hashes[order], keys[order], low[order]
    if column == 0:
        order = np.lexsort((keys, low, hashes))
        hashes, keys, low = hashes[order], keys[order], low[order]
    begins = np.ones(len(hashes), np.bool_)
    begins[1:] = (hashes[1:] != hashes[:-1]) | (low[1:] != low[:-1])
    first = keys[begins][np.cumsum(begins) - 1] if len(keys) else keys
    save_edges(work.folder / EDGES, f"{task:06d}", keys[~begins], first[~begins])
    return {"edges": int((~begins).sum())}


def _read(work: Work, column: int, number: int, ranges: int) -> tuple[Keys, Keys, Keys]:
    """The hashes of a range, their documents' keys, and the exact hash's low half (zeros of a band)."""
    width = 2**64 // ranges
    start, stop = np.uint64(number * width), np.uint64((number + 1) * width - 1)
    last = number == ranges - 1
    hashes, keys, low = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
    for part in _signed(work):
        column_of = np.load(work.path("signatures", part.number, ".hashes.npy"), mmap_mode="r")[column]
        begin = int(np.searchsorted(column_of, start, "left"))
        end = len(column_of) if last else int(np.searchsorted(column_of, stop, "right"))
        rows = np.load(work.path("signatures", part.number, ".rows.npy"), mmap_mode="r")[column, begin:end]
        hashes.append(np.array(column_of[begin:end]))
        keys.append(keys_of(part.number, np.array(rows)))
        if column == 0:
            halves = np.load(work.path("signatures", part.number, ".low.npy"), mmap_mode="r")
            low.append(np.array(halves[begin:end]))
        else:
            low.append(np.zeros(end - begin, np.uint64))
    return np.concatenate(hashes), np.concatenate(keys), np.concatenate(low)
