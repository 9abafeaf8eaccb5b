"""The mixture of a stage: its sources with their shares, and which of them each sample is from."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_prep.config import DataConfig, SetConfig
from data_prep.store import TokenStore
from pipeline.method.stage import Group
from pipeline.model.expert_plan import ExpertPlan

Turns = tuple[NDArray[np.int64], NDArray[np.int64]]
CHUNK = 1 << 14  # samples whose turns are worked out at a time


class Tokens(Protocol):
    """A run of token ids that need not be in memory."""

    def __len__(self) -> int:
        """How many there are."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids ``start`` to ``stop - 1``."""


@dataclass(frozen=True)
class Source:
    """Training tokens of a set, or of one source of a set.

    Attributes:
        name: the set's name, or SET/NUMBER for one source of it.
        tokens: its training tokens.
        weight: its share of samples, up to a common factor.
        is_old: whether its language is an old one.
        group: the group of its language; see :class:`pipeline.model.expert_plan.ExpertPlan`.
    """

    name: str
    tokens: Tokens
    weight: float
    is_old: bool
    group: int


def stage_sources(store: TokenStore, data: DataConfig, shares: dict[Group, float], plan: ExpertPlan) -> list[Source]:
    """The sources of a stage, with their shares.

    Args:
        store: the tokens.
        data: the run's ``data`` section.
        shares: for each group, ``old`` or ``new``, the share of all samples that its sets divide among them.
        plan: which expansion added which languages.
    """
    sources: list[Source] = []
    for group, share in shares.items():
        sets = data.old if group == "old" else data.new
        weights = {name: _weight(store, name, entry, data.temperature) for name, entry in sets.items()}
        total = sum(weights.values())
        for name, entry in sets.items():
            number = plan.group_of(entry.language) if group == "old" else plan.num_groups - 1
            sources += _sources_of_set(store, name, entry, share * weights[name] / total, number, group == "old")
    return sources


def _weight(store: TokenStore, name: str, entry: SetConfig, temperature: float | None) -> float:
    """A set's share of its group: its weight, or with a temperature T, weight x tokens^(1/T)."""
    if temperature is None:
        return entry.weight
    return float(entry.weight * len(store.train(name)) ** (1 / temperature))


def _sources_of_set(
    store: TokenStore, name: str, entry: SetConfig, share: float, group: int, is_old: bool
) -> list[Source]:
    """A set as one source; if its sources have weights, each of them as one."""
    weights = [source.weight for source in entry.sources]
    if not any(weight is not None for weight in weights):
        return [Source(name, store.train(name), share, is_old, group)]
    total = sum(weight or 1.0 for weight in weights)
    return [
        Source(f"{name}/{number}", store.train(name, number), share * (weight or 1.0) / total, is_old, group)
        for number, weight in enumerate(weights)
    ]


class Interleaving:
    """The source of any sample, and its number in that source, without working through those before it.

    The j-th sample of source s is due at (j + 1/2) / weight_s; samples come in the order in which they are due.
    So the first n samples, for any n, hold each source's share to within one sample.

    Args:
        weights: of the sources, all positive.
    """

    def __init__(self, weights: list[float]) -> None:
        assert weights and min(weights) > 0, f"weights {weights}"
        self._weights = weights
        self._span = CHUNK / sum(weights)  # of due times, per chunk

    def turns(self, first: int, size: int) -> Turns:
        """Samples ``first`` to ``first + size - 1``: their sources and their numbers there, [size] each."""
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
        """How many of the first ``num_samples`` samples each source gives."""
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
        """All samples of a chunk: their sources and their numbers there."""
        bounds = zip(self._before(chunk), self._before(chunk + 1), strict=True)
        numbers = [np.arange(start, stop) for start, stop in bounds]
        due = np.concatenate([(n + 0.5) / weight for n, weight in zip(numbers, self._weights, strict=True)])
        source = np.repeat(np.arange(len(numbers)), [len(n) for n in numbers])
        order = np.lexsort((source, due))
        return source[order], np.concatenate(numbers)[order]


class GroupedInterleaving:
    """Old and new sources take turns as groups, and within a group the sources do.

    So every batch holds each group's share to within one sample, however the sets within the groups are weighted: a
    batch of 2 with half of it old holds one old sample, where sources that are all due together would not see to that.

    Args:
        weights: of the sources, all positive.
        groups: of each source, which group it is in.
    """

    def __init__(self, weights: list[float], groups: list[bool]) -> None:
        names = list(dict.fromkeys(groups))
        self._sources = [np.array([i for i, group in enumerate(groups) if group == name]) for name in names]
        self._within = [Interleaving([weights[i] for i in members]) for members in self._sources]
        self._groups = Interleaving([sum(weights[i] for i in members) for members in self._sources])

    def turns(self, first: int, size: int) -> Turns:
        """Samples ``first`` to ``first + size - 1``: their sources and their numbers there, [size] each."""
        group, number = self._groups.turns(first, size)
        source = np.empty_like(number)
        for index, (members, within) in enumerate(zip(self._sources, self._within, strict=True)):
            mine = group == index
            if mine.any():  # in a stretch of samples, a group's numbers follow one another
                which, number[mine] = within.turns(int(number[mine][0]), int(mine.sum()))
                source[mine] = members[which]
        return source, number

    def counts(self, num_samples: int) -> list[int]:
        """How many of the first ``num_samples`` samples each source gives."""
        found: dict[int, int] = {}
        of_groups = self._groups.counts(num_samples)
        for members, within, count in zip(self._sources, self._within, of_groups, strict=True):
            found |= zip(members.tolist(), within.counts(count), strict=True)
        return [found[source] for source in range(len(found))]
