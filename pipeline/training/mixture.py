"""Which source each sample is from: sources take turns as evenly as their weights allow."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Turns = tuple[NDArray[np.int64], NDArray[np.int64]]
CHUNK = 1 << 14  # samples whose turns are worked out at a time


class Interleaving:
    """The source of any sample, and its number in that source, without those before it.

    The j-th sample of source s is due at (j + 1/2) / weight_s; samples come in the order in which they are due. So
    any n samples from the first on hold each source's share to one sample.
    """

    def __init__(self, weights: list[float]) -> None:
        assert weights and min(weights) > 0, f"weights {weights}"
        self._weights = weights
        self._span = CHUNK / sum(weights)  # of due times, a chunk

    def turns(self, first: int, size: int) -> Turns:
        """Samples `first` to `first + size - 1`: their sources and their numbers there, (size,) each."""
        parts: list[Turns] = []
        while size > 0:
            chunk, start = self._chunk_of(first)
            source, number = self._turns(chunk)
            part = slice(first - start, first - start + size)
            parts.append((source[part], number[part]))
            first += len(source[part])
            size -= len(source[part])
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def counts(self, num_samples: int) -> list[int]:
        """How many of the first samples each source gives."""
        if not num_samples:
            return [0] * len(self._weights)
        chunk, start = self._chunk_of(num_samples - 1)
        rest = np.bincount(self._turns(chunk)[0][: num_samples - start], minlength=len(self._weights))
        return [before + int(more) for before, more in zip(self._before(chunk), rest, strict=True)]

    def _chunk_of(self, sample: int) -> tuple[int, int]:
        """The chunk that a sample is in, and the chunk's first sample."""
        chunk = sample // CHUNK
        while sum(self._before(chunk)) > sample:
            chunk -= 1
        while sum(self._before(chunk + 1)) <= sample:
            chunk += 1
        return chunk, sum(self._before(chunk))

    @lru_cache(maxsize=64)  # noqa: B019 - lives as long as the run
    def _before(self, chunk: int) -> list[int]:
        """How many samples of each source are due before a chunk."""
        time = chunk * self._span
        counts = []
        for weight in self._weights:
            count = max(0, int(time * weight - 0.5))
            while (count + 0.5) / weight < time:
                count += 1
            while count > 0 and (count - 1 + 0.5) / weight >= time:
                count -= 1
            counts.append(count)
        return counts

    @lru_cache(maxsize=4)  # noqa: B019 - lives as long as the run
    def _turns(self, chunk: int) -> Turns:
        bounds = zip(self._before(chunk), self._before(chunk + 1), strict=True)
        numbers = [np.arange(start, stop) for start, stop in bounds]
        due = np.concatenate([(n + 0.5) / weight for n, weight in zip(numbers, self._weights, strict=True)])
        source = np.repeat(np.arange(len(numbers)), [len(n) for n in numbers])
        order = np.lexsort((source, due))
        return source[order], np.concatenate(numbers)[order]
