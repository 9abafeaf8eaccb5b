"""Deduplication on disk against brute force in memory. Run: pytest tests/data_prep/dedup/test_duplicates.py"""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.config import DataConfig, NearDuplicatesConfig
from data_prep.dedup import connected_components as components
from data_prep.dedup import deduplicate as survivors
from data_prep.dedup import signature_join as duplicates
from data_prep.dedup.connected_components import large_star, not_smallest, save_edges, small_star
from data_prep.dedup.minhash import Signatures
from data_prep.dedup.word_shingles import word_hashes
from tests.helpers.preparation import prepare


def brute_force(edges: list[tuple[int, int]]) -> set[int]:
    """Nodes that are not the smallest of their component."""
    parent = {node: node for edge in edges for node in edge}

    def root(node: int) -> int:
        while parent[node] != node:
            node = parent[node]
        return node

    for a, b in edges:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return {node for node in parent if root(node) != node}


def on_disk(folder: Path, edges: list[tuple[int, int]], bounds: list[int]) -> tuple[set[int], int]:
    """The same by stars over ranges of nodes, and the rounds it took."""
    pairs = np.array([(max(edge), min(edge)) for edge in edges], np.uint64)
    for number, part in enumerate(np.array_split(pairs, 3)):
        save_edges(folder / "edges", str(number), part[:, 0], part[:, 1])
    source, ranges, rounds = folder / "edges", list(zip(bounds, bounds[1:], strict=False)), 0
    changed = 1
    while changed:
        changed, rounds = 0, rounds + 1
        for star in (large_star, small_star):
            target = folder / f"{star.__name__}_{rounds}"
            target.mkdir()
            changed += sum(star(source, target, task, *limits)["changed"] for task, limits in enumerate(ranges))
            source = target
    return {int(node) for limits in ranges for node in not_smallest(source, *limits)}, rounds


@pytest.mark.parametrize("shape", ["chain", "star", "cycle", "random", "two"])
def test_the_smallest_of_each_component_is_left(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(components, "EDGES_A_PIECE", 37)  # so that every task works in several pieces
    draw = random.Random(shape)
    nodes = draw.sample(range(1000), 300)
    edges = {
        "chain": list(zip(nodes, nodes[1:], strict=False)),
        "star": [(nodes[0], node) for node in nodes[1:]],
        "cycle": list(zip(nodes, [*nodes[1:], nodes[0]], strict=True)),
        "random": [(draw.choice(nodes), draw.choice(nodes)) for _ in range(220)],
        "two": [(a, b) for half in (nodes[:150], nodes[150:]) for a, b in zip(half, half[7:], strict=False)],
    }[shape]
    edges = [edge for edge in edges if edge[0] != edge[1]]
    found, rounds = on_disk(tmp_path, edges, [0, 100, 450, 451, 1000])
    assert found == brute_force(edges)
    assert rounds <= 12


def test_near_copies_agree_in_a_band_about_as_often_as_the_formula_says() -> None:
    near = NearDuplicatesConfig()
    draw = random.Random(1)
    agree = {0.8: 0, 0.5: 0}
    trials = 150
    for similarity in agree:
        signatures = Signatures(near)
        shared = round(2 * similarity / (1 + similarity) * 400)  # of 400 runs each, so that J is the similarity
        for trial in range(trials):
            common = [f"c{trial}-{n}" for n in range(shared + 4)]
            for side in range(2):
                own = [f"s{trial}-{side}-{draw.random()}" for _ in range(400 - shared)]
                signatures.add(2 * trial + side, "", word_hashes_of([*common, *own]))
        hashes, rows, _ = signatures.arrays()
        by_band = [dict(zip(rows[band].tolist(), hashes[band].tolist(), strict=True)) for band in range(1, 15)]
        agree[similarity] = sum(
            any(band[2 * trial] == band[2 * trial + 1] for band in by_band) for trial in range(trials)
        )
    for similarity, count in agree.items():
        expected = 1 - (1 - similarity**near.rows) ** near.bands
        assert abs(count / trials - expected) < 5 * (expected * (1 - expected) / trials) ** 0.5 + 0.05


def word_hashes_of(words: list[str]) -> Any:
    return word_hashes(" ".join(word.replace("-", "x").replace(".", "y") for word in words))


def texts(number: int) -> str:
    draw = random.Random(number)
    return " ".join(f"word{draw.randrange(5000)}" for _ in range(60))


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges and groups of a few documents, as if there were millions."""
    monkeypatch.setattr(duplicates, "DOCUMENTS_A_TASK", 30)
    monkeypatch.setattr(survivors, "DOCUMENTS_A_GROUP", 25)
    monkeypatch.setattr(components, "EDGES_A_PIECE", 8)


def test_the_first_of_each_group_of_copies_stays_across_sets_and_slices(
    write_rows: Any, save_tokenizer: Any, tmp_path: Path, small_tasks: None
) -> None:
    one = [texts(n) for n in range(60)]
    copies = [texts(n) for n in range(0, 60, 3)]
    # A chain: each is nearly the next, the ends are not alike.
    words = texts(99).split()
    chain = [" ".join([*words[: 50 - 2 * n], *texts(98).split()[: 2 * n + 10]]) for n in range(4)]
    near = [f"{texts(n)} one more" for n in range(1, 60, 4)]
    two = [*copies, *near, *[texts(n) for n in range(100, 130)], *chain]
    tree: dict[str, Any] = {
        "held_out": {"fraction": 0.1, "near_copy_threshold": None},
        "slice_bytes": 2000,
        "replay": None,
        "filters": {"exact_duplicates": True, "near_duplicates": {"bands": 28, "rows": 4, "shingle": 2}},
        "old": {"en": {"path": str(write_rows("en.jsonl", [{"text": text} for text in one]))}},
        "new": {"el": {"path": str(write_rows("el.jsonl", [{"text": text} for text in two]))}},
    }
    store = prepare(DataConfig.model_validate(tree), save_tokenizer(), 300, tmp_path / "cache", seed=17)
    old, new = store.sets["en"].manifest, store.sets["el"].manifest
    assert old.slices > 5 and new.slices > 5
    assert "exact_duplicate" not in old.dropped and "near_duplicate" not in old.dropped
    train, held_out = old.train, old.held_out
    assert train is not None and train.documents + held_out.documents == 60
    # Held-out documents are not copied first: what equals one is held out with it, or near it and stays.
    held = {document.page for document in store.held_out_documents("en")}
    free = [n for n in range(60) if f"en.jsonl:{n + 1}" not in held]
    assert new.dropped["exact_duplicate"].documents == sum(n % 3 == 0 for n in free)
    near_held = {document.page for document in store.held_out_documents("el")}
    expected = sum(n % 4 == 1 and f"el.jsonl:{len(copies) + n // 4 + 1}" not in near_held for n in free)
    chain_rows = [len(two) - 3 + n for n in range(4)]
    chained = sum(f"el.jsonl:{row}" not in near_held for row in chain_rows) - 1
    assert new.dropped["near_duplicate"].documents == expected + chained
    for part in old, new:
        assert all("row" in place for lost in part.dropped.values() for place in lost.examples)


def test_text_without_any_copy_loses_nothing(write_rows: Any, save_tokenizer: Any, tmp_path: Path) -> None:
    tree: dict[str, Any] = {
        "held_out": {"fraction": 0.1, "near_copy_threshold": None},
        "filters": {"exact_duplicates": True, "near_duplicates": {}},
        "new": {"el": {"path": str(write_rows("el.jsonl", [{"text": texts(n)} for n in range(40)]))}},
    }
    store = prepare(DataConfig.model_validate(tree), save_tokenizer(), 300, tmp_path / "cache", seed=17)
    assert store.sets["el"].manifest.dropped == {}


def test_deduplication_gives_the_same_files_in_tasks_of_any_size(
    write_rows: Any, save_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": texts(n % 31) + (" more" if n % 3 == 0 else "")} for n in range(90)]
    tree: dict[str, Any] = {
        "held_out": {"fraction": 0.1},
        "slice_bytes": 3000,
        "filters": {"near_duplicates": {}},
        "new": {"el": {"path": str(write_rows("el.jsonl", rows))}},
    }
    stores = []
    for size in (10**9, 23):
        monkeypatch.setattr(duplicates, "DOCUMENTS_A_TASK", size)
        monkeypatch.setattr(survivors, "DOCUMENTS_A_GROUP", size)
        monkeypatch.setattr(components, "EDGES_A_PIECE", size)
        folder = tmp_path / str(size)
        stores.append(prepare(DataConfig.model_validate(tree), save_tokenizer(), 300, folder, seed=17))
    assert stores[0].sets["el"].manifest == stores[1].sets["el"].manifest
    assert stores[0].sets["el"].manifest.dropped["near_duplicate"].documents > 20
