"""Sources alternate by their shares. Run: pytest tests/pipeline/training/test_mixture.py"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.store import TokenStore
from pipeline.config.run import RunConfig
from pipeline.method.stages import find_stage
from pipeline.model.expert_plan import ExpertPlan
from pipeline.training.mixture import CHUNK, GroupedInterleaving, Interleaving
from pipeline.training.sample_order import stage_order
from tests.helpers.preparation import prepare
from tests.helpers.tiny import parse_run, run_tree, save_corpus

PLAN = ExpertPlan.first_expansion([2], old=["en"], new=["el", "hu"], top_k=2, classifier_layers=[])


def test_sets_take_turns_by_weight_in_any_stretch() -> None:
    source, number = Interleaving([1.0, 3.0, 0.5]).turns(0, 450)
    for first in range(0, 450, 45):
        counts = Counter(source[first : first + 45].tolist())
        assert abs(counts[0] - 10) <= 1
        assert abs(counts[1] - 30) <= 1
        assert abs(counts[2] - 5) <= 1
    for which in range(3):
        assert number[source == which].tolist() == list(range(int((source == which).sum())))


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


@pytest.mark.parametrize("batch", [2, 8, 10])
@pytest.mark.parametrize("sets", [(1, 1), (1, 3), (3, 3), (2, 5)])
def test_every_batch_holds_the_groups_shares_whatever_sets_they_are_made_of(batch: int, sets: tuple[int, int]) -> None:
    old, new = sets
    weights = [0.5 / old] * old + [0.5 / new] * new
    turns = GroupedInterleaving(weights, [True] * old + [False] * new)
    source, number = turns.turns(0, 300 * batch)
    assert (source.reshape(300, batch) < old).sum(1).tolist() == [batch // 2] * 300
    counts = turns.counts(300 * batch)
    for which, (weight, count) in enumerate(zip(weights, counts, strict=True)):
        assert abs(count - 300 * batch * weight) <= 1
        assert number[source == which].tolist() == list(range(count))
    for first, size in ((0, 1), (7, 5), (150 * batch + 1, CHUNK // 64)):
        again = turns.turns(first, size)
        np.testing.assert_array_equal(again[0], source[first : first + size])
        np.testing.assert_array_equal(again[1], number[first : first + size])


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
    order = stage_order(store, run.data, find_stage(run, stage), PLAN, 17)
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
