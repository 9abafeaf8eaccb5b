"""The order of samples is a pure function of seed and content. Run: pytest tests/pipeline/test_data.py"""

from collections import Counter

import numpy as np
import pytest

from pipeline.data import SampleOrder, Source, interleave
from pipeline.errors import UserError

LENGTH = 8


def order(num_samples: int = 60, seed: int = 1) -> SampleOrder:
    sources = [
        Source("en", np.arange(1000, 1000 + 8 * 10 + 1, dtype=np.uint16), 1.0, True),
        Source("el", np.arange(0, 8 * 25 + 5, dtype=np.uint16), 3.0, False),
    ]
    return SampleOrder(sources, sequence_length=LENGTH, num_samples=num_samples, seed=seed)


def test_an_epoch_holds_every_window_once_and_the_next_one_in_another_order() -> None:
    samples = order(400)
    starts = [int(samples.window(1, number)[0]) for number in range(50)]
    assert sorted(starts[:25]) == sorted(starts[25:]) == [LENGTH * i for i in range(25)]
    assert starts[:25] != starts[25:]


def test_labels_are_the_next_tokens_and_no_sample_crosses_sets() -> None:
    batch = order().batch(0, 60)
    np.testing.assert_array_equal(batch.labels[:, :-1], batch.ids[:, 1:])
    for ids, labels, source, is_old in zip(batch.ids, batch.labels, batch.sources, batch.is_old, strict=True):
        tokens = np.append(ids, labels[-1])
        np.testing.assert_array_equal(np.diff(tokens), 1)
        assert (tokens >= 1000).all() == (source == 0)
        assert is_old.all() == (source == 0)


@pytest.mark.parametrize(("ranks", "micro"), [(1, 6), (2, 3), (3, 1)])
def test_ranks_and_micro_batches_only_say_who_computes_a_sample(ranks: int, micro: int) -> None:
    whole = order().batch(12, 12).ids
    pieces = [
        order().batch(12 + (step * ranks + rank) * micro, micro).ids
        for step in range(12 // (ranks * micro))
        for rank in range(ranks)
    ]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_sets_take_turns_by_weight_in_any_stretch() -> None:
    source, number = interleave([1.0, 3.0, 0.5], 450)
    for first in range(0, 450, 45):
        counts = Counter(source[first : first + 45].tolist())
        assert abs(counts[0] - 10) <= 1
        assert abs(counts[1] - 30) <= 1
        assert abs(counts[2] - 5) <= 1
    for which in range(3):
        assert number[source == which].tolist() == list(range(int((source == which).sum())))


def test_a_longer_run_begins_with_the_same_samples() -> None:
    np.testing.assert_array_equal(order(60).batch(0, 60).ids, order(500).batch(0, 60).ids)
    assert not np.array_equal(order(60, seed=2).batch(0, 60).ids, order(60).batch(0, 60).ids)


def test_old_tokens_are_known_without_reading() -> None:
    samples = order()
    for first in (0, 7, 31):
        assert samples.old_tokens(first, 9) == int(samples.batch(first, 9).is_old.sum())


def test_a_set_shorter_than_a_sample_is_refused() -> None:
    with pytest.raises(UserError, match=r"set el has 8 training tokens, less than one sample of 8 \+ 1"):
        SampleOrder([Source("el", np.arange(8), 1.0, False)], sequence_length=8, num_samples=1, seed=0)
