"""Which tokens each sample holds, and in which order samples come.

The order is a pure function of (seed, shards, mixture, sequence length). So the state of a run is one integer,
the number of samples consumed. Ranks, micro-batch and accumulation only decide who computes a sample.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from common.errors import UserError
from data_prep.config import DataConfig
from data_prep.store import TokenStore
from pipeline.method.stage import Stage
from pipeline.model.expert_plan import ExpertPlan
from pipeline.training.mixture import GroupedInterleaving, Source, stage_sources

FORMAT = 2  # raised when the same tokens and settings give other samples


@dataclass(frozen=True)
class Batch:
    """Samples of one micro-batch.

    Attributes:
        ids: [B, L] int64, the input.
        labels: [B, L] int64, the next tokens.
        groups: [B, L] int64, the group of languages that each token is of.
        sources: [B] int64, index of the source that each sample is from.
        positions: [B, L] int64, each token's place in its document, counted from the sample's first token; None if
            documents are not isolated.
    """

    ids: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    sources: np.ndarray
    positions: np.ndarray | None = None

    def model_inputs(self, device: Any) -> dict[str, Any]:
        """What a Hugging Face model takes: ``input_ids`` and, if documents are isolated, ``position_ids``.

        Where positions start at 0 again, transformers lets no token attend to one before (masking_utils, packed
        sequences).
        """
        inputs = {"input_ids": torch.from_numpy(self.ids).to(device, non_blocking=True)}
        if self.positions is not None:
            inputs["position_ids"] = torch.from_numpy(self.positions).to(device, non_blocking=True)
        return inputs


class SampleOrder:
    """All samples of a stage, by number.

    A sample is ``sequence_length`` + 1 consecutive tokens of one source; the last is only a label. A source's
    windows come in a random order, a new one in each epoch. Old and new sources alternate as evenly as their shares
    allow, and within the old and the new ones the sources do.

    Args:
        sources: where samples come from.
        sequence_length: L.
        num_samples: of the whole stage.
        seed: of the orders of windows.
        isolate: the document separator's id, if each document of a sample attends to itself alone.

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
        is_old = [source.is_old for source in sources]
        self._interleaving = GroupedInterleaving([source.weight for source in sources], is_old)
        self.groups = np.array([source.group for source in sources], np.int64)
        self.old_sources = np.array(is_old)

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
        groups = np.repeat(self.groups[which, None], self.sequence_length, axis=1)
        positions = None if self.isolate is None else document_positions(ids, self.isolate)
        return Batch(ids, rows[:, 1:], groups, which, positions)

    def read(self, first: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The sources of samples ``first`` to ``first + size - 1``, [B], and their token ids, [B, L + 1] int64."""
        assert first + size <= self.num_samples, "beyond the last sample"
        which, numbers = self._interleaving.turns(first, size)
        rows = np.empty((size, self.sequence_length + 1), np.int64)
        for row, source, number in zip(rows, which.tolist(), numbers.tolist(), strict=True):
            row[:] = self.window(source, number)
        return which, rows

    def old_tokens(self, first: int, size: int, *, of_base: bool = False) -> int:
        """How many tokens of old languages, all or the dense model's, the samples hold, without reading them."""
        counted = self.old_sources & (self.groups == 0) if of_base else self.old_sources
        return int(counted[self._interleaving.turns(first, size)[0]].sum()) * self.sequence_length

    def epochs(self) -> dict[str, float]:
        """How often each source is read over all samples, by the source's name; 1 is once."""
        counts = self._interleaving.counts(self.num_samples)
        return {s.name: count / w for s, count, w in zip(self.sources, counts, self.windows, strict=True)}


def document_positions(ids: np.ndarray, separator_id: int) -> np.ndarray:
    """Each token's place in its document, [B, L]: 0 at a sample's first token and after each separator."""
    places = np.arange(ids.shape[1])
    begins = np.zeros(ids.shape, np.int64)
    begins[:, 1:] = np.where(ids[:, :-1] == separator_id, places[1:], 0)
    return places - np.maximum.accumulate(begins, axis=1)


def stage_order(store: TokenStore, data: DataConfig, stage: Stage, plan: ExpertPlan, seed: int) -> SampleOrder:
    """The samples of a stage.

    Args:
        store: the tokens.
        data: the run's ``data`` section.
        stage: which sets it reads, how many samples of which length.
        plan: which expansion added which languages.
        seed: the run's.

    Raises:
        UserError: a set has fewer tokens than one sample.
    """
    return SampleOrder(
        stage_sources(store, data, stage.shares(), plan),
        sequence_length=stage.settings.sequence_length,
        num_samples=stage.settings.num_steps * stage.settings.global_batch_size,
        seed=seed + stage.seed_offset,
        isolate=store.separator_id if data.isolate_documents else None,
    )
