"""The order of samples is a pure function of seed and content.

Run: pytest tests/pipeline/training/test_sample_order.py
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from common.errors import UserError
from data_prep.store import TokenStore
from pipeline.config.load import parse_run
from pipeline.config.run import RunConfig
from pipeline.training.mixture import CHUNK, Interleaving
from pipeline.training.sample_order import SampleOrder, Source, document_positions, stage_order
from tests.helpers.preparation import prepare
from tests.helpers.tiny import run_tree, save_corpus, save_model

LENGTH = 8


class InMemory:
    """Tokens for tests."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.ids[start:stop]


def order(num_samples: int = 60, seed: int = 1) -> SampleOrder:
    sources = [
        Source("en", InMemory(np.arange(1000, 1000 + 8 * 10 + 1, dtype=np.uint16)), 1.0, True),
        Source("el", InMemory(np.arange(0, 8 * 25 + 5, dtype=np.uint16)), 3.0, False),
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
    source, number = Interleaving([1.0, 3.0, 0.5]).turns(0, 450)
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
        SampleOrder([Source("el", InMemory(np.arange(8)), 1.0, False)], sequence_length=8, num_samples=1, seed=0)


def test_turns_do_not_depend_on_where_reading_begins() -> None:
    turns = Interleaving([0.3, 1.7, 0.01])
    source, number = turns.turns(0, 3 * CHUNK)
    for first, size in ((0, 1), (CHUNK - 3, 7), (2 * CHUNK - 1, CHUNK), (17, 2)):
        again = turns.turns(first, size)
        np.testing.assert_array_equal(again[0], source[first : first + size])
        np.testing.assert_array_equal(again[1], number[first : first + size])


@pytest.mark.parametrize("weights", [[1.0], [1.0, 3.0, 0.5], [0.1, 0.2, 0.3, 1e-3], [7.0, 7.0]])
@pytest.mark.parametrize("num_samples", [1, 97, CHUNK, 3 * CHUNK + 11])
def test_shares_are_right_to_one_sample_after_any_number_of_samples(weights: list[float], num_samples: int) -> None:
    turns = Interleaving(weights)
    source, number = turns.turns(0, num_samples)
    for which, (weight, count) in enumerate(zip(weights, turns.counts(num_samples), strict=True)):
        assert abs(count - num_samples * weight / sum(weights)) <= 1
        assert number[source == which].tolist() == list(range(count))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_no_sample_is_lost_or_repeated_in_an_epoch_whatever_the_ranks_and_interruptions(world_size: int) -> None:
    tokens = InMemory(np.arange(LENGTH * 64 + 1))
    seen: list[int] = []
    done = 0
    for steps in (3, 1, 7, 2, 3):  # the job is interrupted after each of these, and resumed from the samples consumed
        samples = SampleOrder([Source("el", tokens, 1.0, False)], sequence_length=LENGTH, num_samples=64, seed=5)
        for _ in range(steps):
            for rank in range(world_size):
                share = 4 // world_size
                seen += samples.batch(done + rank * share, share).ids[:, 0].tolist()
            done += 4
    assert sorted(seen) == list(range(0, LENGTH * 64, LENGTH))


def test_positions_begin_anew_after_each_separator() -> None:
    ids = np.array([[5, 6, 0, 7, 0, 0, 8, 9], [0, 5, 6, 7, 8, 9, 1, 2]])
    assert document_positions(ids, 0).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3"])
def test_an_isolated_document_of_a_packed_sample_has_the_logits_it_has_alone(family: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / family, family, 2), dtype=torch.float32).eval()
    parts = [[5, 9, 40, 0], [7, 0], [11, 12, 13, 14, 15]]
    packed = InMemory(np.array([id_ for part in parts for id_ in part] + [1]))
    samples = {
        isolate: SampleOrder(
            [Source("el", packed, 1.0, False)], sequence_length=11, num_samples=1, seed=0, isolate=isolate
        )
        for isolate in (0, None)
    }
    with torch.no_grad():
        isolated, joined = (
            model(**samples[isolate].batch(0, 1).model_inputs("cpu"), use_cache=False).logits for isolate in (0, None)
        )
        start = 0
        for part in parts:
            alone = model(input_ids=torch.tensor([part]), use_cache=False).logits
            torch.testing.assert_close(isolated[:, start : start + len(part)], alone, rtol=1e-4, atol=1e-4)
            start += len(part)
    assert not torch.allclose(isolated[:, 6:], joined[:, 6:], rtol=1e-2, atol=1e-2)


def stored(folder: Path, **data: Any) -> tuple[TokenStore, RunConfig]:
    """A store of a small and a large new set, one of them from two sources, and an old one; and its run."""
    folder.mkdir(exist_ok=True)
    corpus = save_corpus(folder / "text", ["en", "el", "hu"])
    more = save_corpus(folder / "more", ["el"], pages=200)
    tree = run_tree(folder)
    sources = [{"path": str(corpus["el"])}, {"path": str(more["el"])}]
    for source, weight in zip(sources, data.pop("weights", []), strict=False):
        source["weight"] = weight
    tree["data"]["new"] = {"el": {"sources": sources}, "hu": {"path": str(corpus["hu"]), "weight": 0.5}}
    tree["data"] |= data
    run = parse_run(tree, "x")
    return prepare(run.data, run.model.path, 300, run.cache_dir, 17), run


def shares(store: TokenStore, run: RunConfig, stage: int = 1) -> dict[str, float]:
    order = stage_order(store, run.data, run.stage(stage), 17)
    counts = Counter(order.sources[s].name for s in order.batch(0, order.num_samples).sources.tolist())
    return {name: count / order.num_samples for name, count in counts.items()}


def test_sets_share_samples_by_weight_and_with_a_temperature_by_tokens(tmp_path: Path) -> None:
    store, run = stored(tmp_path)
    assert shares(store, run) == pytest.approx({"el": 2 / 3, "hu": 1 / 3}, abs=1 / 48)
    assert shares(store, run, 2) == pytest.approx({"en": 0.3, "el": 0.7 * 2 / 3, "hu": 0.7 / 3}, abs=1 / 48)
    for temperature in (1.0, 3.0):
        again, run = stored(tmp_path, temperature=temperature)
        assert again.keys == store.keys
        sizes = {name: len(store.train(name)) ** (1 / temperature) for name in ("el", "hu")}
        sizes["hu"] *= 0.5
        expected = {name: size / sum(sizes.values()) for name, size in sizes.items()}
        assert shares(store, run) == pytest.approx(expected, abs=1 / 48)


def test_sources_share_a_sets_samples_by_their_weights(tmp_path: Path) -> None:
    store, run = stored(tmp_path, weights=[3.0, 1.0])
    found = shares(store, run)
    assert found == pytest.approx({"el/0": 0.5, "el/1": 1 / 6, "hu": 1 / 3}, abs=1 / 48)
    assert len(store.train("el", 0)) + len(store.train("el", 1)) == len(store.train("el"))


def test_a_stage_isolates_documents_where_the_run_says_so(tmp_path: Path) -> None:
    store, run = stored(tmp_path, isolate_documents=True)
    order = stage_order(store, run.data, run.stage1, 17)
    batch = order.batch(0, order.num_samples)
    assert batch.positions is not None
    np.testing.assert_array_equal(batch.positions, document_positions(batch.ids, store.separator_id))
    assert (batch.positions[:, 1:] == 0).any()
