"""Signatures by which copies find each other: a 128-bit hash of the text, and MinHash bands of its word runs."""

import numpy as np
import xxhash
from numpy.typing import NDArray
from rensa import RMinHash

from data_prep.config import NearDuplicatesConfig
from data_prep.dedup.word_shingles import Hashes, shingles

MINHASH_SEED = 1
BATCH = 512  # documents whose signatures are computed at a time


class Signatures:
    """Collects a slice's signatures: of each document, hashes that are equal where it is joined to another.

    Column 0 is the exact text's (with `low`, the other half of its 128 bits); then one per MinHash band.
    """

    def __init__(self, near: NearDuplicatesConfig | None) -> None:
        self._near = near
        self._rows: list[int] = []
        self._exact: list[int] = []
        self._shingles: list[Hashes] = []
        self._bands: list[NDArray[np.uint64]] = []

    def add(self, index: int, text: str, words: Hashes | None) -> None:
        """Sign a document; `words` are its words' hashes, needed for near duplicates."""
        self._rows.append(index)
        self._exact.append(xxhash.xxh3_128_intdigest(text.encode()))
        if self._near is not None:
            assert words is not None
            self._shingles.append(shingles(words, self._near.shingle))
            if len(self._shingles) == BATCH:
                self._sign()

    def arrays(self) -> tuple[NDArray[np.uint64], NDArray[np.uint32], NDArray[np.uint64]]:
        """Hashes (columns, documents), each column sorted; rows in that order; the exact hash's low half."""
        if self._shingles:
            self._sign()
        high = np.array([value >> 64 for value in self._exact], np.uint64)
        low = np.array([value & (2**64 - 1) for value in self._exact], np.uint64)
        columns = [high]
        if self._near is not None:
            bands = np.concatenate(self._bands) if self._bands else np.empty((0, self._near.bands), np.uint64)
            columns += list(bands.T)
        order = [np.argsort(column, kind="stable") for column in columns]
        rows = np.array(self._rows, np.uint32)
        hashes = np.stack([column[o] for column, o in zip(columns, order, strict=True)])
        return hashes, np.stack([rows[o] for o in order]), low[order[0]]

    def _sign(self) -> None:
        assert self._near is not None
        flat = np.concatenate(self._shingles)
        offsets = np.cumsum([0, *map(len, self._shingles)]).astype(np.uint64)
        permutations = self._near.bands * self._near.rows
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, permutations, MINHASH_SEED)
        values = np.array(matrix.to_rows(), np.uint32).reshape(len(self._shingles), self._near.bands, -1)
        self._bands.append(
            np.array(
                [[xxhash.xxh3_64_intdigest(band.tobytes(), seed=b) for b, band in enumerate(row)] for row in values],
                np.uint64,
            )
        )
        self._shingles = []
