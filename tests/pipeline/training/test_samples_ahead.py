"""Samples are read while others are trained on, in the same order. Run: pytest tests/pipeline/training"""

import threading
import time
from typing import Any

import numpy as np
import pytest

from pipeline.run.context import RunContext
from pipeline.training.sample_order import Batch, SampleOrder, stage_order
from pipeline.training.samples_ahead import Places, SamplesAhead
from tests.helpers.tiny import do_steps, parse_run, run_tree

SECONDS = 20.0


@pytest.fixture(scope="module")
def order(tmp_path_factory: pytest.TempPathFactory) -> SampleOrder:
    run = parse_run(run_tree(tmp_path_factory.mktemp("samples"), data={"isolate_documents": True}), "x")
    context = do_steps(RunContext(run), "tokenize", "similarity", "allocate")
    return stage_order(context.store, run.data, context.stage(1), context.plan, run.seed)


@pytest.mark.parametrize(("ranks", "size", "accumulation"), [(1, 8, 1), (2, 2, 2), (3, 1, 3), (5, 2, 1), (8, 1, 1)])
def test_ranks_take_every_sample_once_and_in_the_order_of_the_stage(
    order: SampleOrder, ranks: int, size: int, accumulation: int
) -> None:
    readers = [SamplesAhead(order, Places(8, size, accumulation, ranks, rank), pin=False) for rank in range(ranks)]
    for step in range(order.num_samples // 8):
        rows, counted = [], []
        for micro_step in range(accumulation):
            for reader in readers:
                number = step * accumulation + micro_step
                first, empty = reader.places.first(number)
                batch = reader.take(number)
                expected = order.batch(first, size)
                for name in ("ids", "labels", "groups", "sources", "positions"):
                    np.testing.assert_array_equal(getattr(batch, name), getattr(expected, name))
                rows += list(batch.ids[empty:])
                counted += list(range(first + empty, first + size))
        assert counted == list(range(8 * step, 8 * step + 8))
        np.testing.assert_array_equal(rows, order.batch(8 * step, 8).ids)
    for reader in readers:
        reader.close()


def test_the_next_samples_are_read_while_the_last_are_trained_on(
    order: SampleOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: dict[int, threading.Event] = {first: threading.Event() for first in range(0, order.num_samples, 8)}
    may_end, original, threads = threading.Event(), SampleOrder.batch, set()

    def slow(self: SampleOrder, first: int, size: int) -> Batch:
        threads.add(threading.current_thread().name)
        begun[first].set()
        assert first == 0 or may_end.wait(SECONDS)
        return original(self, first, size)

    monkeypatch.setattr(SampleOrder, "batch", slow)
    reader = SamplesAhead(order, Places(8, 8, 1, 1, 0), pin=False)
    reader.take(0)
    assert begun[8].wait(SECONDS), "it is read before anything asks for it"
    assert not begun[16].is_set(), "a step ahead, and no more"
    may_end.set()
    reader.take(1)
    assert all(name.startswith("samples") for name in threads)
    reader.close()


def test_what_fails_while_reading_is_raised_where_the_samples_are_taken(
    order: SampleOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Batch:
        raise OSError("the disk is gone")

    monkeypatch.setattr(SampleOrder, "batch", broken)
    reader = SamplesAhead(order, Places(8, 8, 1, 1, 0), pin=False)
    with pytest.raises(OSError, match="the disk is gone"):
        reader.take(0)
    reader.close()


def test_what_it_has_waited_is_counted(order: SampleOrder, monkeypatch: pytest.MonkeyPatch) -> None:
    original = SampleOrder.batch

    def slow(self: SampleOrder, first: int, size: int) -> Batch:
        time.sleep(0.05)
        return original(self, first, size)

    monkeypatch.setattr(SampleOrder, "batch", slow)
    reader = SamplesAhead(order, Places(8, 8, 1, 1, 0), pin=False)
    assert reader.waited == 0.0
    reader.take(0)
    assert reader.waited > 0.04
    reader.close()


def test_it_begins_anywhere(order: SampleOrder) -> None:
    reader = SamplesAhead(order, Places(8, 4, 2, 1, 0), pin=False)
    last = order.num_samples // 4 - 1
    for number in (last, 3, 0):
        np.testing.assert_array_equal(reader.take(number).ids, order.batch(4 * number, 4).ids)
    reader.close()
