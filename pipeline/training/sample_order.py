"""Which tokens each sample holds, and in which order samples come.

The order is a pure function of (seed, shards, mixture, sequence length): the state of a run is one
integer, the samples consumed. Ranks, micro-batch and accumulation only say who computes a sample.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from common.errors import UserError
from data_prep.config import DataConfig, SetConfig
from data_prep.store import TokenStore
from pipeline.config.run import Stage1Config, Stage2Config
from pipeline.training.mixture import Interleaving


class Tokens(Protocol):
    """A run of token ids that need not be in memory."""

    def __len__(self) -> int:
        """How many there are."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids `start` to `stop - 1`."""


@dataclass(frozen=True)
class Source:
    """Training tokens of a set, or of one source of it; ``weight`` is its share of samples, up to a common factor."""

    name: str
    tokens: Tokens
    weight: float
    is_old: bool


@dataclass(frozen=True)
class Batch:
    """Samples of one micro-batch.

    Attributes:
        ids: [B, L] int64, the input.
        labels: [B, L] int64, the next tokens.
        is_old: [B, L] bool, whether the token is of an old language.
        sources: [B] int64, index of the source that each sample is from.
        positions: [B, L] int64, each token's place in its document, counted from the sample's beginning; or None.
    """

    ids: np.ndarray
    labels: np.ndarray
    is_old: np.ndarray
    sources: np.ndarray
    positions: np.ndarray | None = None

    def model_inputs(self, device: Any) -> dict[str, Any]:
        """What a Hugging Face model takes, as tensors.

        Where positions begin anew, transformers lets no token attend to one before (masking_utils, packed sequences).
        """
        import torch

        inputs = {"input_ids": torch.from_numpy(self.ids).to(device)}
        if self.positions is not None:
            inputs["position_ids"] = torch.from_numpy(self.positions).to(device)
        return inputs


class SampleOrder:
    """All samples of a stage, by number.

    A sample is ``sequence_length`` + 1 consecutive tokens of one source (the last is only a label). A source's
    windows come in a random order, another one each epoch. Sources take turns as evenly as their weights
    allow, so that any stretch of samples holds nearly their shares.

    Args:
        isolate: the document separator's id, where each document of a sample is to be attended to alone.

    Raises:
        UserError: a source has fewer tokens than one sample.
    """

    def __init__(
        self,
        sources: list[Source],
        *,
        sequence_length: int,
        num_samples: int,
        seed: int,
        isolate: int | None = None,
    ) -> None:
        self.sources, self.sequence_length, self.num_samples, self.seed = sources, sequence_length, num_samples, seed
        self.isolate = isolate
        self.windows = [(len(source.tokens) - 1) // sequence_length for source in sources]
        for source, windows in zip(sources, self.windows, strict=True):
            if windows < 1:
                budget = " (data.replay may be what limits it)" if source.is_old else ""
                raise UserError(
                    f"data: set {source.name} has {len(source.tokens)} training tokens, less than one sample of "
                    f"{sequence_length} + 1; give it more text or a shorter sequence_length{budget}"
                )
        self._interleaving = Interleaving([source.weight for source in sources])
        self.old_sources = np.array([source.is_old for source in sources])

    def window(self, source: int, number: int) -> np.ndarray:
        """The ``number``-th sample of a source: [L + 1] token ids."""
        epoch, position = divmod(number, self.windows[source])
        start = int(self._permutation(source, epoch)[position]) * self.sequence_length
        return self.sources[source].tokens.read(start, start + self.sequence_length + 1)

    @lru_cache(maxsize=64)  # noqa: B019 - lives as long as the run
    def _permutation(self, source: int, epoch: int) -> np.ndarray:
        name = f"{self.seed}/{self.sources[source].name}/{epoch}".encode()
        key = int.from_bytes(hashlib.sha256(name).digest()[:16], "little")
        windows = self.windows[source]
        permutation = np.random.Generator(np.random.Philox(key=key)).permutation(windows)
        return permutation.astype(np.uint32) if windows < 2**32 else permutation

    def batch(self, first: int, size: int) -> Batch:
        """Samples ``first`` to ``first + size - 1``."""
        which, rows = self.read(first, size)
        ids = rows[:, :-1]
        is_old = np.repeat(self.old_sources[which, None], self.sequence_length, axis=1)
        positions = None if self.isolate is None else document_positions(ids, self.isolate)
        return Batch(ids, rows[:, 1:], is_old, which, positions)

    def read(self, first: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The sources of samples ``first`` to ``first + size - 1``, [B], and their token ids, [B, L + 1] int64."""
        assert first + size <= self.num_samples, "beyond the last sample"
        which, numbers = self._interleaving.turns(first, size)
        rows = np.empty((size, self.sequence_length + 1), np.int64)
        for row, source, number in zip(rows, which.tolist(), numbers.tolist(), strict=True):
            row[:] = self.window(source, number)
        return which, rows

    def old_tokens(self, first: int, size: int) -> int:
        """How many tokens of old languages the samples hold, without reading them."""
        return int(self.old_sources[self._interleaving.turns(first, size)[0]].sum()) * self.sequence_length

    def epochs(self) -> dict[str, float]:
        """How often each source is gone through over all samples."""
        counts = self._interleaving.counts(self.num_samples)
        return {s.name: count / w for s, count, w in zip(self.sources, counts, self.windows, strict=True)}


def document_positions(ids: np.ndarray, separator_id: int) -> np.ndarray:
    """Each token's place in its document, [B, L]: 0 at a sample's beginning and after each separator."""
    places = np.arange(ids.shape[1])
    begins = np.zeros(ids.shape, np.int64)
    begins[:, 1:] = np.where(ids[:, :-1] == separator_id, places[1:], 0)
    return places - np.maximum.accumulate(begins, axis=1)


def stage_order(store: TokenStore, data: DataConfig, stage: Stage1Config | Stage2Config, seed: int) -> SampleOrder:
    """The samples of a stage: new sets in stage 1; in stage 2 old sets too, which share ``old_share``."""
    shares = {"new": 1.0}
    if isinstance(stage, Stage2Config):
        shares = {"old": stage.old_share, "new": 1 - stage.old_share}
    sources: list[Source] = []
    for group, share in shares.items():
        sets = data.old if group == "old" else data.new
        weights = {name: _weight(store, name, entry, data.temperature) for name, entry in sets.items()}
        total = sum(weights.values())
        for name, entry in sets.items():
            sources += _sources(store, name, entry, share * weights[name] / total, group == "old")
    return SampleOrder(
        sources,
        sequence_length=stage.sequence_length,
        num_samples=stage.num_steps * stage.global_batch_size,
        seed=seed + (1 if isinstance(stage, Stage2Config) else 0),
        isolate=store.separator_id if data.isolate_documents else None,
    )


def _weight(store: TokenStore, name: str, entry: SetConfig, temperature: float | None) -> float:
    """A set's share of its group: its weight, or with a temperature T, weight x tokens^(1/T)."""
    if temperature is None:
        return entry.weight
    return float(entry.weight * len(store.train(name)) ** (1 / temperature))


def _sources(store: TokenStore, name: str, entry: SetConfig, share: float, is_old: bool) -> list[Source]:
    """A set as one source; where its sources have weights, each by itself."""
    weights = [source.weight for source in entry.sources]
    if not any(weight is not None for weight in weights):
        return [Source(name, store.train(name), share, is_old)]
    total = sum(weight or 1.0 for weight in weights)
    return [
        Source(f"{name}/{number}", store.train(name, number), share * (weight or 1.0) / total, is_old)
        for number, weight in enumerate(weights)
    ]


def text_windows(
    store: TokenStore, name: str, sequence_length: int, seed: int, batch_size: int = 4
) -> Iterator[np.ndarray]:
    """Windows drawn over the whole of a set's training tokens, in a random order, [B, L] each, one epoch."""
    tokens = store.train(name)
    length = min(sequence_length, len(tokens) - 1)
    windows = (len(tokens) - 1) // length
    order = SampleOrder([Source(name, tokens, 1.0, False)], sequence_length=length, num_samples=windows, seed=seed)
    for first in range(0, windows, batch_size):
        yield order.read(first, min(batch_size, windows - first))[1][:, :-1]
