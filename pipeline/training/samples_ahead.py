"""Reads samples on a thread, a step ahead of the training that takes them."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pipeline.training.sample_order import Batch, SampleOrder


@dataclass(frozen=True)
class Places:
    """Which samples each micro-step of a stage computes on this rank; micro-steps are counted over the whole stage.

    Where the ranks do not divide the global batch, the last micro-step of a step has room for more samples than are
    left. Its first places repeat earlier samples, so that all ranks do the same work.

    Attributes:
        batch: samples of the global batch.
        size: of the micro-batch.
        accumulation: micro-steps of a step.
        world_size: ranks.
        rank: this one.
    """

    batch: int
    size: int
    accumulation: int
    world_size: int
    rank: int

    def first(self, number: int) -> tuple[int, int]:
        """The first sample of a micro-step, and how many of its samples, from there on, count for nothing."""
        step, micro_step = divmod(number, self.accumulation)
        wanted = step * self.batch + (micro_step * self.world_size + self.rank) * self.size
        first = min(wanted, (step + 1) * self.batch - self.size)
        return first, min(self.size, wanted - first)


class SamplesAhead:
    """The micro-batches of one rank, in the order in which they are trained on.

    Args:
        order: all samples of the stage.
        places: which of them this rank computes.
        pin: whether to put them into pinned memory, from which a GPU copies while it computes.

    Attributes:
        waited: seconds that :meth:`take` has waited, over the whole stage.
    """

    def __init__(self, order: SampleOrder, places: Places, *, pin: bool) -> None:
        self._order, self.places, self._pin = order, places, pin
        self._end = order.num_samples // places.batch * places.accumulation
        self._reading: dict[int, Future[Batch]] = {}
        self._thread = ThreadPoolExecutor(1, "samples")
        self.waited = 0.0

    def take(self, number: int) -> Batch:
        """The samples of a micro-step; those after it are read from now on."""
        self._reading = {later: future for later, future in self._reading.items() if later >= number}
        for later in range(number, min(number + self.places.accumulation + 1, self._end)):
            if later not in self._reading:
                self._reading[later] = self._thread.submit(self._read, later)
        started = time.monotonic()
        samples = self._reading.pop(number).result()
        self.waited += time.monotonic() - started
        return samples

    def _read(self, number: int) -> Batch:
        batch = self._order.batch(self.places.first(number)[0], self.places.size)
        return _pinned(batch) if self._pin else batch

    def close(self) -> None:
        """Stop reading."""
        self._thread.shutdown(wait=True, cancel_futures=True)


def _pinned(batch: Batch) -> Batch:
    """The same samples in pinned memory."""

    def pinned(array: np.ndarray) -> Any:
        return torch.from_numpy(array).pin_memory().numpy()

    positions = None if batch.positions is None else pinned(batch.positions)
    return replace(
        batch, ids=pinned(batch.ids), labels=pinned(batch.labels), groups=pinned(batch.groups),
        sources=pinned(batch.sources), positions=positions,
    )  # fmt: skip
