"""Sets are prepared, keyed and cached one by one. Run: pytest tests/data_prep/test_token_sets.py"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.files import read_json
from data_prep.config import DataConfig
from data_prep.executor.pool import do_task
from data_prep.make_plan import plan_of
from data_prep.plan import Plan
from data_prep.prepare import kept_keys, plan_preparation
from data_prep.store import TokenStore
from tests.data_prep.conftest import pages
from tests.helpers.preparation import config_of, prepare, set_folders
from tests.helpers.preparation_jobs import Job, digests, write_run

Tree = dict[str, Any]


@pytest.fixture
def tree(write_rows: Any) -> Tree:
    """English (old) and Greek (new), 60 pages each; training text is compared with no held-out text."""
    return {
        "held_out": {"by": "page", "fraction": 0.1, "near_copy_threshold": None},
        "replay": None,
        "slice_bytes": 2000,
        "old": {"en": {"path": str(write_rows("en.jsonl", pages("en", 60)))}},
        "new": {"el": {"path": str(write_rows("el.jsonl", pages("el", 60)))}},
    }


@pytest.fixture
def watched(write_rows: Any) -> Tree:
    """A set to watch: two documents that are in the Greek training text, and one that is nowhere."""
    rows = [row for row in pages("el", 60) if row["page"] in ("page-3", "page-4")]
    return {"path": str(write_rows("watch.jsonl", [*rows, {"text": "ένα άλλο κείμενο εδώ"}])), "language": "el"}


@pytest.fixture
def stored(save_tokenizer: Any, tmp_path: Path) -> Any:
    """stored(tree, …): the sets of these settings."""
    tokenizer = save_tokenizer()

    def make(tree: Tree, cache: str = "cache", seed: int = 17, **options: Any) -> TokenStore:
        return prepare(DataConfig.model_validate(tree), tokenizer, 300, tmp_path / cache, seed, **options)

    return make


def stamps(store: TokenStore) -> dict[str, tuple[int, int]]:
    """Inode and time of change of every file of a store's sets."""
    files = [path for one in store.sets.values() for path in [one.folder, *one.folder.rglob("*")]]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


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


def cleaned(tree: Tree) -> Tree:
    """The same, with training text compared with held-out text."""
    return {**tree, "held_out": {"by": "page", "fraction": 0.1, "near_copy_threshold": 0.8}}


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
    changed = DataConfig.model_validate({**cleaned(tree), "watch": {"seen": watched}, "max_document_bytes": 5000})
    planned = plan_preparation(config_of(changed, save_tokenizer(), 300, tmp_path / "cache", 17))
    assert kept_keys(planned, one.keys) == planned.keys
    same = DataConfig.model_validate({**cleaned(tree), "watch": {"seen": watched}})
    planned = plan_preparation(config_of(same, save_tokenizer(), 300, tmp_path / "cache", 17))
    assert kept_keys(planned, one.keys) == {**planned.keys, **one.keys}
    assert kept_keys(planned, {"en": one.keys["en"], "el": "gone"}) == {**planned.keys, "en": one.keys["en"]}
    assert not planned.is_prepared(one.keys)
    stored({**cleaned(tree), "watch": {"seen": watched}}, keep=one.keys)
    assert planned.is_prepared(one.keys) and not planned.is_prepared({})


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


KILLED = """
import json, os, signal, sys
from pathlib import Path
import data_prep.executor.pool as pool
from data_prep.config import DataConfig
from tests.helpers.preparation import prepare

do_task, left = pool.do_task, [int(sys.argv[4])]
def killed(call):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return do_task(call)
pool.do_task = killed
tree, keep = json.loads(sys.argv[1])
prepare(DataConfig.model_validate(tree), sys.argv[2], 300, Path(sys.argv[3]), 17, keep=keep)
"""


def test_kills_while_a_set_is_added_leave_the_others_alone_and_give_the_same_bytes(
    tree: Tree, watched: Tree, write_rows: Any, save_tokenizer: Any, stored: Any, tmp_path: Path
) -> None:
    tree = {**cleaned(tree), "filters": {"exact_duplicates": True}, "replay": {"tokens": 2000}}
    one = stored(tree)
    files = stamps(one)
    more = {**tree, "watch": {"seen": watched}, "replay": {"tokens": 1000}}  # Greek is kept, and its copies counted
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    arguments = [json.dumps([more, one.keys]), str(tmp_path / "tokenizer"), str(tmp_path / "cache")]
    for tasks in (3, 9, 9):
        command = [sys.executable, "-c", KILLED, *arguments, str(tasks)]
        assert subprocess.run(command, check=False, env=environment).returncode == -signal.SIGKILL
    two = stored(more, keep=one.keys)
    assert two.keys["el"] == one.keys["el"] and two.keys["en"] != one.keys["en"]
    assert stamps(one) == files
    stored(tree, cache="other")
    other = stored(more, cache="other", keep=one.keys)
    assert other.keys == two.keys
    for name, one_set in two.sets.items():
        for file in ["manifest.json", *one_set.manifest.files]:
            assert (one_set.folder / file).read_bytes() == (other.sets[name].folder / file).read_bytes(), (name, file)
    assert not list((tmp_path / "cache" / "tokens").glob(".*.work"))


def test_jobs_that_add_a_set_side_by_side_give_the_bytes_of_one(tmp_path: Path) -> None:
    from tests.helpers.tiny import save_tokenizer

    save_tokenizer(tmp_path / "tokenizer")
    run = write_run(tmp_path, str(tmp_path / "tokenizer"), documents=100)
    assert Job(run, "local", 1).wait() == [0], (tmp_path / "log.txt").read_text()
    shutil.copytree(tmp_path / "cache", tmp_path / "before")
    settings = yaml.safe_load(run.read_text())
    settings["data"]["replay"] = {"tokens": 10_000}
    run.write_text(yaml.safe_dump(settings))
    assert Job(run, "local", 1).wait() == [0], (tmp_path / "log.txt").read_text()
    expected = digests(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    shutil.move(tmp_path / "before", tmp_path / "cache")
    assert set(Job(run, "array", 3).wait()) == {0}, (tmp_path / "log.txt").read_text()
    assert digests(tmp_path / "cache") == expected


def test_a_job_that_comes_late_follows_the_plan_that_is_there(
    tree: Tree, watched: Tree, save_tokenizer: Any, stored: Any, tmp_path: Path
) -> None:
    data = DataConfig.model_validate({**tree, "watch": {"seen": watched}})
    planned = plan_preparation(config_of(data, save_tokenizer(), 300, tmp_path / "cache", 17))
    first = plan_of(planned, {})
    first.save(tmp_path / "plan.json")
    stored(tree)  # another run prepares two of the three sets meanwhile
    late = plan_of(planned, {})
    assert [one.name for one in late.sets] == ["seen"]
    late.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == first


def test_a_set_that_another_run_finishes_meanwhile_is_left_alone(
    tree: Tree, watched: Tree, stored: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    both = {**tree, "watch": {"seen": watched}}

    def interrupted(call: Any) -> Any:
        if call.function.__name__ == "publish":
            raise KeyboardInterrupt
        return do_task(call)

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.executor.pool.do_task", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stored(both)
    assert set_folders(tmp_path / "cache") == []
    other = stored(tree)
    files = stamps(other)
    unfinished = tmp_path / "cache" / "tokens" / stored(both, cache="elsewhere").keys["seen"]
    (unfinished / "train").mkdir(parents=True)  # what somebody deleted in part
    store = stored(both)
    assert stamps(other) == files
    store.verify()
