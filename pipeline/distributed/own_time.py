"""How long this rank works within a step, without the time that it waits for others."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

Moment = float | torch.cuda.Event


class OwnTime:
    """Adds up the time from the beginning of each micro-step to the last mark in it, without waits before the mark.

    On a GPU the moments are events on the current stream, as kernels run later than they are started: a wait is the
    time in which the stream stands still for a collective. Only :meth:`take` waits for the device.
    """

    def __init__(self) -> None:
        self._device = torch.device("cpu")
        self._worked: list[tuple[Moment, Moment]] = []  # since then, until then
        self._since: Moment | None = None  # None outside of steps
        self._marked: tuple[int, Moment, Moment] | None = None  # the first of _worked, and then since, until

    def begin(self, device: torch.device) -> None:
        """A micro-step begins: what came after the mark of the one before does not count."""
        self._device = device
        self._keep_marked()
        self._since = self._now()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a collective that waits for other ranks."""
        if self._since is not None:
            self._worked.append((self._since, self._now()))
        yield
        if self._since is not None:
            self._since = self._now()

    def mark(self) -> None:
        """What this rank has worked so far counts."""
        if self._since is not None:
            self._marked = len(self._worked), self._since, self._now()

    def take(self) -> float:
        """Seconds that count since this was called last; then nothing is measured until the next beginning."""
        self._keep_marked()
        spans, self._worked, self._since = self._worked, [], None
        return sum(_seconds(since, until) for since, until in spans)

    def _keep_marked(self) -> None:
        if self._marked is not None:
            count, since, until = self._marked
            self._worked[count:] = [(since, until)]
            self._marked = None

    def _now(self) -> Moment:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(since: Moment, until: Moment) -> float:
    if isinstance(since, float):
        assert isinstance(until, float)
        return until - since
    assert not isinstance(until, float)
    until.synchronize()
    return float(since.elapsed_time(until)) / 1e3


OWN_TIME = OwnTime()  # of this process, which trains one stage at a time
