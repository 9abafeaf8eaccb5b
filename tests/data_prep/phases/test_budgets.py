"""Caps and replay: what is taken, from where, and how exactly. Run: pytest tests/data_prep/phases/test_budgets.py"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from data_prep.config import DataConfig
from data_prep.phases.budgets import is_reached, take
from data_prep.plan import Budget
from data_prep.store import TokenStore
from data_prep.tokenizer import DocumentEncoder
from tests.helpers.preparation import documents, prepare


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"text": f"document {n} " + " ".join(f"w{n * k % 977}" for k in range(5, 40))} for n in range(start, count)
    ]


@pytest.fixture
def corpus(write_rows: Any, save_tokenizer: Any, tmp_path: Path) -> Any:
    """corpus(entry, …): a store of an old set of 600 documents, and of a new one with these settings."""
    path = write_rows("a.jsonl", rows(600))
    save_tokenizer()

    def stored(
        cache: str = "cache",
        workers: int = 1,
        stage1_tokens: int | None = None,
        seed: int = 17,
        entry: Any = None,
        **data: Any,
    ) -> TokenStore:
        tree: dict[str, Any] = {
            "held_out": {"fraction": 0.05, "near_copy_threshold": None},
            "slice_bytes": 8000,
            "replay": None,
            "old": {"en": {"path": str(path), **(entry or {})}},
            "new": {"el": {"path": str(write_rows("b.jsonl", rows(700, 600)))}},
        }
        tree |= data
        return prepare(
            DataConfig.model_validate(tree), str(tmp_path / "tokenizer"), 300, tmp_path / cache, seed,
            stage1_tokens=stage1_tokens, workers=workers,
        )  # fmt: skip

    return stored


def taken_from(store: TokenStore, name: str = "en") -> list[str]:
    return [shard.name for shard in store.sets[name].manifest.shards]


@pytest.mark.parametrize(
    ("cap", "unit", "limit"),
    [({"max_tokens": 30_000}, "tokens", 30_000), ({"max_documents": 77}, "documents", 77),
     ({"max_characters": 20_000}, "characters", 20_000)],
)  # fmt: skip
def test_a_cap_is_reached_to_one_document_and_never_passed(corpus: Any, cap: Any, unit: str, limit: int) -> None:
    everything, store = corpus(), corpus(entry=cap)
    train = store.sets["en"].manifest.train
    assert train is not None
    most = max(map(len, documents(everything.train("en")))) if unit == "tokens" else 300 if unit == "characters" else 1
    assert limit - most < getattr(train, unit) <= limit
    assert store.sets["en"].manifest.slices_beyond_budget >= 3
    assert store.sets["en"].manifest.dropped["over_budget"].documents > 0
    store.verify()


def test_the_slices_that_a_cap_takes_depend_on_the_seed(corpus: Any) -> None:
    one, other = corpus(entry={"max_tokens": 60_000}), corpus(entry={"max_tokens": 60_000}, seed=18)
    assert taken_from(one) != taken_from(other)
    assert taken_from(one) != sorted(taken_from(corpus()))[: len(taken_from(one))]


def test_a_larger_cap_takes_the_same_and_more(corpus: Any) -> None:
    small, large = corpus(entry={"max_documents": 100}), corpus(entry={"max_documents": 200})
    assert set(taken_from(small)) < set(taken_from(large))


def test_sources_have_caps_of_their_own_within_the_sets(corpus: Any, write_rows: Any) -> None:
    paths = [str(write_rows(f"s{n}.jsonl", rows(1000 * (n + 1) + 300, 1000 * (n + 1)))) for n in range(2)]
    sources = [{"path": paths[0], "max_documents": 40}, {"path": paths[1]}]
    tree = {"en": {"sources": sources}}
    by_source = corpus(old=tree)
    counts = [sum(s.documents for s in by_source.sets["en"].manifest.shards if s.source == n) for n in range(2)]
    assert counts[0] == 40 and counts[1] > 250
    both = corpus(old={"en": {"sources": sources, "max_documents": 60}})
    assert sum(s.documents for s in both.sets["en"].manifest.shards) == 60
    assert len(both.train("en", 0)) + len(both.train("en", 1)) == len(both.train("en"))


def test_replay_is_drawn_across_the_whole_corpus_within_its_budget(corpus: Any) -> None:
    everything, store = corpus(), corpus(replay={"tokens": 40_000})
    train = store.sets["en"].manifest.train
    assert train is not None
    assert 40_000 - 600 < train.tokens <= 40_000
    assert len(taken_from(store)) > 0.9 * len(taken_from(everything))
    assert store.keys["el"] == everything.keys["el"]
    assert taken_from(store) == taken_from(corpus(replay={"tokens": 40_000}, cache="other"))
    assert not np.array_equal(store.train("en").read(0, 500), everything.train("en").read(0, 500))


def test_replay_is_a_share_of_stage_1_by_default_under_one_percent(corpus: Any) -> None:
    default = DataConfig.model_validate({"new": {"el": {"path": "x"}}}).replay
    assert default is not None and default.share is not None and default.share < 0.01
    store = corpus(replay={"share": 0.009}, stage1_tokens=3_000_000)
    train = store.sets["en"].manifest.train
    assert train is not None
    assert 27_000 - 600 < train.tokens <= 27_000


def test_a_replay_budget_in_characters_and_one_larger_than_the_corpus(corpus: Any) -> None:
    train = corpus(replay={"characters": 20_000}).sets["en"].manifest.train
    assert train is not None and 20_000 - 300 < train.characters <= 20_000
    everything = corpus()
    assert corpus(replay={"tokens": 10**9}).sets["en"].manifest.train == everything.sets["en"].manifest.train


def test_old_sets_share_a_replay_budget_by_weight(corpus: Any, write_rows: Any) -> None:
    old = {
        "en": {"path": str(write_rows("x.jsonl", rows(2300, 2000))), "weight": 3},
        "zh": {"path": str(write_rows("y.jsonl", rows(3300, 3000)))},
    }
    store = corpus(old=old, replay={"tokens": 20_000})
    tokens = {name: len(store.train(name)) for name in ("en", "zh")}
    assert 14_400 < tokens["en"] <= 15_000
    assert 4_400 < tokens["zh"] <= 5_000


def test_the_seed_says_which_documents_are_replayed(corpus: Any) -> None:
    stores = [corpus(replay={"tokens": 20_000}, seed=seed, cache=f"c{n}") for n, seed in enumerate((17, 17, 18))]
    ids = [store.train("en").read(0, len(store.train("en"))).tolist() for store in stores]
    assert ids[0] == ids[1] != ids[2]


def test_a_budget_on_a_watch_set_is_refused() -> None:
    with pytest.raises(ValidationError, match="only max_documents of the whole set"):
        DataConfig.model_validate({"new": {"el": {"path": "x"}}, "watch": {"w": {"path": "y", "max_tokens": 5}}})


def test_a_share_of_a_watch_set_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"watch\.w\.held_out_fraction: a watch set is held out whole"):
        DataConfig.model_validate(
            {"new": {"el": {"path": "x"}}, "watch": {"w": {"path": "y", "held_out_fraction": 0.1}}}
        )


def test_taking_stops_at_the_first_document_that_does_not_fit() -> None:
    lengths = {1: np.array([5, 50, 1]), 2: np.array([9]), 3: np.array([2, 2])}
    totals = {n: {"documents": len(v), "tokens": int(v.sum()), "characters": 0} for n, v in lengths.items()}

    def get(number: int) -> Any:
        return {"tokens": lengths[number], "characters": lengths[number] * 0}

    assert take([3, 1, 2], totals, Budget(tokens=10), get) == {3: 2, 1: 1}
    assert take([3, 1, 2], totals, Budget(), get) == {3: 2, 1: 3, 2: 1}
    assert take([3, 2, 1], totals, Budget(documents=3), get) == {3: 2, 2: 1}
    assert is_reached([3, 1, 2], {3: totals[3], 1: totals[1]}, Budget(tokens=10))
    assert not is_reached([3, 1, 2], {1: totals[1]}, Budget(tokens=10))
    assert not is_reached([3, 2], {3: totals[3], 2: totals[2]}, Budget(tokens=13))


def test_with_a_replay_budget_a_document_is_encoded_once(corpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    encode = DocumentEncoder.encode

    def counted(self: DocumentEncoder, texts: list[str], *dtype: Any) -> Any:
        seen.extend(texts if dtype else ())  # else it is a probe of what a slice gives
        return encode(self, texts, *dtype)

    monkeypatch.setattr(DocumentEncoder, "encode", counted)
    corpus(replay={"tokens": 40_000})
    assert len(seen) == len(set(seen)) > 300
