"""Connected components of a graph on disk: of each, the smallest key is left. Memory does not grow with the graph.

The alternating algorithm of Kiveris and others, "Connected Components in MapReduce and Beyond" (SoCC 2014): a large
star ties a node's larger neighbours to its smallest one, a small star its smaller ones and itself, until every
component is a star around its smallest node. Edges are kept as pairs sorted by the node that the next step groups by;
a task does one range of nodes, whatever the degree of any of them, in pieces of a bounded number of edges.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.files import save_array
from data_prep.plan import Json

EDGES_A_PIECE = 1 << 20
Keys = NDArray[np.uint64]


def save_edges(folder: Path, name: str, larger: Keys, smaller: Keys) -> None:
    """Write edges (each from a larger to a smaller key) sorted by either end: (edges, 2) arrays."""
    order = np.lexsort((smaller, larger))
    down = np.stack([larger[order], smaller[order]], axis=1)
    again = np.zeros(len(down), np.bool_)
    again[1:] = (down[1:] == down[:-1]).all(axis=1)
    down = down[~again]
    up = down[np.lexsort((down[:, 0], down[:, 1]))][:, ::-1]
    for suffix, edges in ((".down.npy", down), (".up.npy", up)):
        save_array(folder / f"{name}{suffix}", edges)


def large_star(source: Path, target: Path, task: int, low: int, high: int) -> Json:
    """Tie the larger neighbours of each node in [low, high) to its smallest neighbour, or itself."""
    nodes, smallest = _smallest(lambda: _pieces(source, low, high, (".down.npy", ".up.npy")))
    smallest = np.minimum(smallest, nodes)
    changed = edges = 0
    for number, piece in enumerate(_pieces(source, low, high, (".up.npy",))):
        tied = smallest[np.searchsorted(nodes, piece[:, 0])]
        changed += int((tied != piece[:, 0]).sum())
        edges += len(piece)
        save_edges(target, f"{task:06d}.{number:06d}", piece[:, 1], tied)
    return {"changed": changed, "edges": edges}


def small_star(source: Path, target: Path, task: int, low: int, high: int) -> Json:
    """Tie the smaller neighbours of each node in [low, high), and itself, to its smallest neighbour."""
    nodes, smallest = _smallest(lambda: _pieces(source, low, high, (".down.npy",)))
    changed = edges = 0
    for number, piece in enumerate(_pieces(source, low, high, (".down.npy",))):
        tied = smallest[np.searchsorted(nodes, piece[:, 0])]
        is_smallest = tied == piece[:, 1]
        changed += int((~is_smallest).sum())
        larger = np.where(is_smallest, piece[:, 0], piece[:, 1])
        save_edges(target, f"{task:06d}.{number:06d}", larger, tied)
        edges += len(piece)
    return {"changed": changed, "edges": edges}


def not_smallest(source: Path, low: int, high: int) -> Keys:
    """Of finished components, the nodes in [low, high) that are not the smallest of theirs, sorted."""
    found = [np.unique(piece[:, 0]) for piece in _pieces(source, low, high, (".down.npy",))]
    return np.unique(np.concatenate([np.empty(0, np.uint64), *found]))


def _pieces(folder: Path, low: int, high: int, suffixes: tuple[str, ...]) -> Iterator[NDArray[np.uint64]]:
    """Edges whose first node is in [low, high), at most EDGES_A_PIECE at a time."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: the work has been finished, or deleted, by another job")
    waiting: list[NDArray[np.uint64]] = []
    count = 0
    for path in sorted(folder.glob("*.npy")):
        if not path.name.endswith(suffixes):
            continue
        edges = np.load(path, mmap_mode="r")
        if not len(edges):
            continue
        begin, end = np.searchsorted(edges[:, 0], np.array([low, high], np.uint64), "left")
        for start in range(int(begin), int(end), EDGES_A_PIECE):
            part = np.array(edges[start : min(int(end), start + EDGES_A_PIECE)])
            waiting.append(part)
            count += len(part)
            if count >= EDGES_A_PIECE:
                yield np.concatenate(waiting)
                waiting, count = [], 0
    if waiting:
        yield np.concatenate(waiting)


def _smallest(pieces: Callable[[], Iterator[NDArray[np.uint64]]]) -> tuple[Keys, Keys]:
    """Each node that edges begin at, sorted, and the smallest node they end at."""
    nodes, smallest = np.empty(0, np.uint64), np.empty(0, np.uint64)
    for piece in pieces():
        nodes, where = np.unique(np.concatenate([nodes, piece[:, 0]]), return_inverse=True)
        values = np.concatenate([smallest, piece[:, 1]])
        smallest = np.full(len(nodes), np.iinfo(np.uint64).max, np.uint64)
        np.minimum.at(smallest, where, values)
    return nodes, smallest
