"""Sets are prepared, keyed and cached one by one. Run: pytest tests/data_prep/test_token_sets.py"""

import shutil
from pathlib import Path
from typing import Any

import pytest

from common.files import read_json
from data_prep.config import DataConfig
from data_prep.executor.pool import do_task
from data_prep.make_plan import Planned
from data_prep.prepare import plan_preparation
from data_prep.store import TokenStore
from tests.data_prep.conftest import pages
from tests.helpers.preparation import cleaned, config_of, set_folders, stamps

Tree = dict[str, Any]


def new_sets(cache: Path, before: list[Path]) -> set[str]:
    """The keys of the sets that have come into a cache."""
    return {path.name for path in set_folders(cache)} - {path.name for path in before}


def test_with_one_more_watch_set_only_that_set_is_prepared(
    tree: Tree, watched: Tree, stored: Any, tmp_path: Path
) -> None:
    one = stored(tree)
    before, files = set_folders(tmp_path / "cache"), stamps(one)
    two = stored({**tree, "watch": {"seen": watched}})
    assert new_sets(tmp_path / "cache", before) == {two.keys["seen"]}
    assert {name: two.keys[name] for name in one.keys} == one.keys
    assert stamps(one) == files
    two.verify()


def test_a_set_with_another_name_or_group_of_training_is_shared(tree: Tree, stored: Any, tmp_path: Path) -> None:
    one = stored(tree)
    before, files = set_folders(tmp_path / "cache"), stamps(one)
    renamed = {**tree, "old": {"english": tree["old"]["en"]}, "new": {"greek": {**tree["new"]["el"], "weight": 2}}}
    two = stored(renamed)
    assert list(two.keys) == ["english", "greek"] and list(two.keys.values()) == list(one.keys.values())
    swapped = stored({**tree, "old": tree["new"], "new": tree["old"]})
    assert swapped.keys == {"el": one.keys["el"], "en": one.keys["en"]}
    assert new_sets(tmp_path / "cache", before) == set()
    assert stamps(one) == files
    manifest = (one.sets["el"].folder / "manifest.json").read_text()
    assert '"group"' not in manifest and '"name": "el"' not in manifest


def test_a_run_with_a_language_of_another_shares_it_wherever_its_file_lies(
    tree: Tree, stored: Any, write_rows: Any, tmp_path: Path
) -> None:
    one = stored(tree)
    before, files = set_folders(tmp_path / "cache"), stamps(one)
    moved = shutil.copy(tree["old"]["en"]["path"], tmp_path / "moved.jsonl")
    hungarian = {"path": str(write_rows("hu.jsonl", pages("hu", 60)))}
    two = stored({**tree, "old": {"en": {"path": str(moved)}}, "new": {"hu": hungarian}})
    assert two.keys["en"] == one.keys["en"]
    assert new_sets(tmp_path / "cache", before) == {two.keys["hu"]}
    assert stamps(one) == files


def test_another_replay_budget_prepares_only_the_old_sets(tree: Tree, stored: Any, tmp_path: Path) -> None:
    tree["filters"] = {"exact_duplicates": True}  # so that the others are read and signed all the same
    one = stored({**tree, "replay": {"tokens": 2000}})
    before, files = set_folders(tmp_path / "cache"), stamps(one)
    two = stored({**tree, "replay": {"tokens": 1000}})
    assert new_sets(tmp_path / "cache", before) == {two.keys["en"]}
    assert two.keys["el"] == one.keys["el"]
    assert stamps(one) == files
    assert len(two.train("en")) <= 1000 < len(one.train("en")) <= 2000


def test_two_names_of_the_same_text_are_one_set(tree: Tree, stored: Any, tmp_path: Path) -> None:
    store = stored({**tree, "new": {**tree["new"], "again": {**tree["new"]["el"], "language": "el"}}})
    assert store.keys["again"] == store.keys["el"]
    assert len(set_folders(tmp_path / "cache")) == 2


def planted(store: TokenStore) -> int:
    """How many of the two pages in the watched set are trained on."""
    held_out = {document.page for document in store.held_out_documents("el")}
    return len({"page-3", "page-4"} - held_out)


def test_a_new_watch_set_leaves_kept_training_sets_alone_and_says_how_many_copies_they_hold(
    tree: Tree, watched: Tree, stored: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = stored(cleaned(tree))
    assert planted(one) == 2
    before, files = set_folders(tmp_path / "cache"), stamps(one)
    capsys.readouterr()
    with_watched = {**cleaned(tree), "watch": {"seen": watched}}
    two = stored(with_watched, keep=one.keys)
    assert new_sets(tmp_path / "cache", before) == {two.keys["seen"]}
    assert {name: two.keys[name] for name in ("en", "el")} == one.keys
    assert stamps(one) == files
    said = (
        "warning: training sees 2 copies of text in seen, in the training documents of el (2): these sets are kept as "
        "they were when training began"
    )
    assert [line for line in capsys.readouterr().out.splitlines() if "copies" in line or "copy" in line] == [said]
    stored(with_watched, keep=one.keys)
    assert capsys.readouterr().out.splitlines() == ["tokens: en, el, seen: there already, skipped", said]


def test_without_keep_training_sets_are_cleaned_of_a_new_watch_set(
    tree: Tree, watched: Tree, stored: Any, tmp_path: Path
) -> None:
    one = stored(cleaned(tree))
    before, files = set_folders(tmp_path / "cache"), stamps(one)
    two = stored({**cleaned(tree), "watch": {"seen": watched}})
    assert new_sets(tmp_path / "cache", before) == set(two.keys.values())
    assert two.sets["el"].manifest.dropped["near_copy"].documents == 2
    assert two.sets["el"].manifest.train.documents == one.sets["el"].manifest.train.documents - 2
    assert stamps(one) == files
    fresh = stored({**cleaned(tree), "watch": {"seen": watched}}, cache="other")
    assert fresh.keys == two.keys


def test_a_new_benchmark_without_copies_is_said_to_have_none(
    tree: Tree, stored: Any, write_rows: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    one = stored(cleaned(tree))
    before = set_folders(tmp_path / "cache")
    capsys.readouterr()
    benchmark = {"path": str(write_rows("quiz.jsonl", [{"question": "what is there"}])), "text_field": "question"}
    two = stored({**cleaned(tree), "benchmarks": {"quiz": benchmark}}, keep=one.keys)
    assert two.keys == one.keys
    assert "tokens: 0 copies of new held-out text in the kept training sets en, el\n" in capsys.readouterr().out
    [folder] = new_sets(tmp_path / "cache", before)
    held = read_json(tmp_path / "cache" / "tokens" / folder / "manifest.json")["held_out"]
    assert (held["documents"], held["characters"]) == (1, len("what is there"))


def test_a_set_that_differs_in_more_than_its_cleaning_is_not_kept(
    tree: Tree, watched: Tree, save_tokenizer: Any, stored: Any, tmp_path: Path
) -> None:
    one = stored(cleaned(tree))

    def plan(keep: dict[str, str], **settings: object) -> Planned:
        data = DataConfig.model_validate({**cleaned(tree), "watch": {"seen": watched}, **settings})
        return plan_preparation(config_of(data, save_tokenizer(), 300, tmp_path / "cache", 17), keep=keep)

    changed = plan(one.keys, max_document_bytes=5000)
    assert changed.kept_keys == changed.keys
    same = plan(one.keys)
    assert same.kept_keys == {**same.keys, **one.keys}
    assert plan({"en": one.keys["en"], "el": "gone"}).kept_keys == {**same.keys, "en": one.keys["en"]}
    assert not same.is_prepared
    stored({**cleaned(tree), "watch": {"seen": watched}}, keep=one.keys)
    assert same.is_prepared and not plan({}).is_prepared


def test_a_count_of_copies_that_was_interrupted_resumes_and_is_the_same(
    tree: Tree, watched: Tree, stored: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = stored(cleaned(tree))
    with_watched = {**cleaned(tree), "watch": {"seen": watched}}
    counted: list[int] = []

    def interrupted(call: Any) -> Any:
        if call.function.__name__ == "count_copies":
            counted.append(call.task)
            if len(counted) == 3:
                raise KeyboardInterrupt
        return do_task(call)

    monkeypatch.setattr("data_prep.executor.pool.do_task", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stored(with_watched, keep=one.keys)
    stored(with_watched, keep=one.keys)
    assert len(counted) == len(set(counted)) + 1 > 4, "only the interrupted task is done again"
    assert "training sees 2 copies of text in seen" in capsys.readouterr().out


def test_text_that_nothing_is_compared_with_is_read_once(
    tree: Tree, stored: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases: list[str] = []

    def noting(call: Any) -> Any:
        phases.append(call.function.__name__)
        return do_task(call)

    monkeypatch.setattr("data_prep.executor.pool.do_task", noting)
    store = stored(tree)
    assert set(phases) == {"index_source", "tokenize_slice", "write_set", "publish"}
    documents = [one.manifest.train.documents + one.manifest.held_out.documents for one in store.sets.values()]
    assert documents == [60, 60]
    phases.clear()
    stored(cleaned(tree))
    assert "filter_slice" in phases
