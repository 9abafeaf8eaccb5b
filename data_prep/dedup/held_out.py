"""Which documents are held out of training, and which training documents contain or nearly copy one of those.

A document is held out by a hash of its page, never by line: a page and its translations fall on the same side, in
every set and every run of the same seed. Copies are found by the share of a held-out text's word triples that a
training document holds too: exact, and a near copy (by Jaccard similarity) always holds as large a share.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.files import save_array
from common.seeded import seeded_hash
from data_prep.dedup.word_shingles import Hashes

SHINGLE = 3  # words in a run
# A text with fewer distinct runs than this, such as a heading, rightly stands in many others: those must only not be
# a copy of it as a whole.
CONTAINED_RUNS = 12


def is_held_out(page: str, seed: int, fraction: float) -> bool:
    """Whether the documents of this page (or with this text) are held out: true for `fraction` of all pages."""
    return seeded_hash(seed, page) < fraction * 2**64


class HeldOutRuns(NamedTuple):
    """The held-out texts of a set as word runs: all their distinct runs in a row, and how many each text has."""

    runs: NDArray[np.uint64]
    sizes: NDArray[np.uint32]


class CopyIndex:
    """Finds documents that contain `threshold` of an indexed text's word runs. The large arrays are mapped."""

    def __init__(self, folder: Path, threshold: float) -> None:
        def array(name: str) -> NDArray[np.generic]:
            return np.load(folder / f"{name}.npy", mmap_mode="r")

        self._runs, self._texts = array("runs"), array("texts")
        self._sizes, self._origins = np.array(array("sizes")), np.array(array("origins"))
        self._threshold = threshold

    @staticmethod
    def write(folder: Path, sets: Iterable[HeldOutRuns]) -> int:
        """Index the texts of some sets, in a folder; returns how many texts there are."""
        parts = list(sets)
        sizes = np.concatenate([np.empty(0, np.uint32), *(part.sizes for part in parts)])
        runs = np.concatenate([np.empty(0, np.uint64), *(part.runs for part in parts)])
        texts = np.repeat(np.arange(len(sizes), dtype=np.uint32), sizes)
        order = np.argsort(runs, kind="stable")
        counts = np.array([len(part.sizes) for part in parts], np.int64)
        origins = np.repeat(np.arange(len(parts), dtype=np.uint32), counts)
        arrays = {"runs": runs[order], "texts": texts[order], "sizes": sizes, "origins": origins}
        for name, values in arrays.items():
            save_array(folder / f"{name}.npy", values)
        return len(sizes)

    def origins(self, runs: Hashes) -> list[int]:
        """The numbers of the sets, sorted, with a text that a document with these (sorted, distinct) runs copies."""
        if not len(runs) or not len(self._runs):
            return []
        first = np.searchsorted(self._runs, runs, "left")
        hit = self._runs[np.minimum(first, len(self._runs) - 1)] == runs
        if not hit.any():
            return []
        first = first[hit]
        counts = np.searchsorted(self._runs, runs[hit], "right") - first
        positions = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        texts, shared = np.unique(self._texts[positions], return_counts=True)
        sizes = self._sizes[texts].astype(np.int64)
        # Of a short text, the Jaccard similarity counts; of others, how much of it is held.
        whole = np.where(sizes < CONTAINED_RUNS, sizes + len(runs) - shared, sizes)
        found = self._origins[texts[shared >= self._threshold * whole]]
        return [int(origin) for origin in np.unique(found)]
