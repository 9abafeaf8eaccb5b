"""Which tokens each sample holds, and in which order samples come.

The order is a pure function of (seed, shards, mixture, sequence length): the state of a run is one
integer, the samples consumed. Ranks, micro-batch and accumulation only say who computes a sample.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data_prep.store import TokenStore
from pipeline.config import DataConfig, Stage1Config, Stage2Config
from pipeline.errors import UserError


@dataclass(frozen=True)
class Source:
    """One set's training tokens; ``weight`` is its share of all samples, up to a common factor."""

    name: str
    tokens: np.ndarray
    weight: float
    is_old: bool


@dataclass(frozen=True)
class Batch:
    """Samples of one micro-batch.

    Attributes:
        ids: [B, L] int64, the input.
        labels: [B, L] int64, the next tokens.
        is_old: [B, L] bool, whether the token is of an old language.
        sources: [B] int64, index of the set that each sample is from.
    """

    ids: np.ndarray
    labels: np.ndarray
    is_old: np.ndarray
    sources: np.ndarray


class SampleOrder:
    """All samples of a stage, by number.

    A sample is ``sequence_length`` + 1 consecutive tokens of one set (the last is only a label). A set's
    windows come in a random order, another one each epoch. Sets take turns as evenly as their weights
    allow, so that any stretch of samples holds nearly their shares.

    Raises:
        UserError: a set has fewer tokens than one sample.
    """

    def __init__(self, sources: list[Source], *, sequence_length: int, num_samples: int, seed: int) -> None:
        self.sources, self.sequence_length, self.num_samples, self.seed = sources, sequence_length, num_samples, seed
        self.windows = [(len(source.tokens) - 1) // sequence_length for source in sources]
        for source, windows in zip(sources, self.windows, strict=True):
            if windows < 1:
                raise UserError(
                    f"data: set {source.name} has {len(source.tokens)} training tokens, less than one sample of "
                    f"{sequence_length} + 1; give it more text or a shorter sequence_length"
                )
        self.source_of, self.number_in_source = interleave([source.weight for source in sources], num_samples)
        self.old_sources = np.array([source.is_old for source in sources])

    def window(self, source: int, number: int) -> np.ndarray:
        """The ``number``-th sample of a set: [L + 1] token ids."""
        epoch, position = divmod(number, self.windows[source])
        start = int(self._permutation(source, epoch)[position]) * self.sequence_length
        return self.sources[source].tokens[start : start + self.sequence_length + 1]

    @lru_cache(maxsize=64)  # noqa: B019 - lives as long as the run
    def _permutation(self, source: int, epoch: int) -> np.ndarray:
        name = f"{self.seed}/{self.sources[source].name}/{epoch}".encode()
        key = int.from_bytes(hashlib.sha256(name).digest()[:16], "little")
        return np.random.Generator(np.random.Philox(key=key)).permutation(self.windows[source])

    def batch(self, first: int, size: int) -> Batch:
        """Samples ``first`` to ``first + size - 1``."""
        which = self.source_of[first : first + size]
        numbers = self.number_in_source[first : first + size]
        assert len(which) == size, "beyond the last sample"
        rows = np.stack([self.window(s, n) for s, n in zip(which.tolist(), numbers.tolist(), strict=True)])
        rows = rows.astype(np.int64)
        is_old = np.repeat(self.old_sources[which, None], self.sequence_length, axis=1)
        return Batch(rows[:, :-1], rows[:, 1:], is_old, which)

    def old_tokens(self, first: int, size: int) -> int:
        """How many tokens of old languages the samples hold, without reading them."""
        return int(self.old_sources[self.source_of[first : first + size]].sum()) * self.sequence_length

    def epochs(self) -> dict[str, float]:
        """How often each set is gone through over all samples."""
        counts = np.bincount(self.source_of, minlength=len(self.sources))
        return {s.name: float(c / w) for s, c, w in zip(self.sources, counts, self.windows, strict=True)}


def interleave(weights: list[float], num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Which set each sample is from, and its number in that set.

    The j-th sample of set s is due at (j + 1/2) / weight_s; samples come in the order in which they are
    due. The first n of more samples are the same n.
    """
    total = sum(weights)
    counts = [int(np.ceil(weight / total * num_samples)) + 1 for weight in weights]
    due = np.concatenate([(np.arange(count) + 0.5) / weight for count, weight in zip(counts, weights, strict=True)])
    source = np.repeat(np.arange(len(weights)), counts)
    number = np.concatenate([np.arange(count) for count in counts])
    order = np.lexsort((source, due))[:num_samples]
    return source[order], number[order]


def stage_order(store: TokenStore, data: DataConfig, stage: Stage1Config | Stage2Config, seed: int) -> SampleOrder:
    """The samples of a stage: new sets in stage 1; in stage 2 old sets too, which share ``old_share``."""
    shares = {"new": 1.0}
    if isinstance(stage, Stage2Config):
        shares = {"old": stage.old_share, "new": 1 - stage.old_share}
    sources = []
    for group, share in shares.items():
        sets = data.old if group == "old" else data.new
        total = sum(entry.weight for entry in sets.values())
        for name, entry in sets.items():
            sources.append(Source(name, store.train(name).tokens, share * entry.weight / total, group == "old"))
    return SampleOrder(
        sources,
        sequence_length=stage.sequence_length,
        num_samples=stage.num_steps * stage.global_batch_size,
        seed=seed + (1 if isinstance(stage, Stage2Config) else 0),
    )


def text_windows(
    store: TokenStore, name: str, sequence_length: int, seed: int, batch_size: int = 4
) -> Iterator[np.ndarray]:
    """Windows drawn over the whole of a set's training tokens, in a random order, [B, L] each, one epoch."""
    tokens = store.train(name).tokens
    length = min(sequence_length, len(tokens) - 1)
    windows = (len(tokens) - 1) // length
    order = SampleOrder([Source(name, tokens, 1.0, False)], sequence_length=length, num_samples=windows, seed=seed)
    for first in range(0, windows, batch_size):
        yield order.batch(first, min(batch_size, windows - first)).ids
