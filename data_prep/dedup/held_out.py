"""Which documents are held out of training, and which training documents contain or nearly copy one of those.

A document is held out by a hash of its page, never by line: a page and its translations fall on the same side, in
every set and every run of the same seed. Copies are found by the share of a held-out text's word triples that a
training document holds too: exact, and a near copy (by Jaccard similarity) always holds as large a share.
"""

import hashlib
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.files import atomic_file
from data_prep.dedup.word_shingles import Hashes

SHINGLE = 3  # words a run
# A text with fewer distinct runs than this, such as a heading, stands in many others by right: those only have to be
# no copy of it as a whole.
CONTAINED_RUNS = 12

Reason = Literal["near_copy", "benchmark"]


def is_held_out(key: str, seed: int, fraction: float) -> bool:
    """Whether the documents of this key (a page, or a text) are held out: true for `fraction` of all keys."""
    digest = hashlib.blake2b(f"{seed}\0{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


class HeldOutRuns(NamedTuple):
    """Held-out texts as word runs: all their distinct runs in a row, how many each has, which are benchmarks."""

    runs: NDArray[np.uint64]
    sizes: NDArray[np.uint32]
    is_benchmark: NDArray[np.bool_]


class CopyIndex:
    """Finds texts that contain `threshold` of an indexed text's word runs. The arrays are mapped, not read."""

    def __init__(self, folder: Path, threshold: float) -> None:
        def array(name: str) -> NDArray[np.generic]:
            return np.load(folder / f"{name}.npy", mmap_mode="r")

        self._runs, self._texts = array("runs"), array("texts")
        self._sizes, self._is_benchmark = np.array(array("sizes")), np.array(array("is_benchmark"))
        self._threshold = threshold

    @staticmethod
    def write(folder: Path, parts: list[HeldOutRuns]) -> int:
        """Index texts, in a folder; returns how many there are."""
        sizes = np.concatenate([np.empty(0, np.uint32), *(part.sizes for part in parts)])
        runs = np.concatenate([np.empty(0, np.uint64), *(part.runs for part in parts)])
        texts = np.repeat(np.arange(len(sizes), dtype=np.uint32), sizes)
        order = np.argsort(runs, kind="stable")
        is_benchmark = np.concatenate([np.empty(0, np.bool_), *(part.is_benchmark for part in parts)])
        arrays = {"runs": runs[order], "texts": texts[order], "sizes": sizes, "is_benchmark": is_benchmark}
        for name, values in arrays.items():
            with atomic_file(folder / f"{name}.npy") as temporary, open(temporary, "wb") as file:
                np.save(file, values)
        return len(sizes)

    def copied(self, runs: Hashes) -> Reason | None:
        """Of what a text with these (sorted, distinct) runs is a copy or a container, if of any."""
        if not len(runs) or not len(self._runs):
            return None
        first = np.searchsorted(self._runs, runs, "left")
        hit = self._runs[np.minimum(first, len(self._runs) - 1)] == runs
        if not hit.any():
            return None
        first = first[hit]
        counts = np.searchsorted(self._runs, runs[hit], "right") - first
        positions = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        texts, shared = np.unique(self._texts[positions], return_counts=True)
        sizes = self._sizes[texts].astype(np.int64)
        # Of a short text, the Jaccard similarity counts; of others, how much of it is held.
        whole = np.where(sizes < CONTAINED_RUNS, sizes + len(runs) - shared, sizes)
        found = texts[shared >= self._threshold * whole]
        if not len(found):
            return None
        return "benchmark" if self._is_benchmark[found].all() else "near_copy"
