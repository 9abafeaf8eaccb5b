"""Run: pytest tests/data_prep/test_prepare.py"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from common.files import sha256_file
from data_prep.config import DataConfig
from data_prep.store import TokenStore
from data_prep.tokenizer import DocumentEncoder
from tests.helpers.preparation import changed, documents, prepare, set_folders


def files_of(store: TokenStore) -> dict[str, bytes]:
    return {
        f"{name}/{file}": (one.folder / file).read_bytes()
        for name, one in store.sets.items()
        for file in one.manifest.files
    }


def texts(store: TokenStore, folder: str, name: str, part: str) -> list[str]:
    shard = getattr(store, part)(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer.decode(ids[:-1]) for ids in documents(shard)]


def test_every_document_is_in_one_part_and_comes_back_as_it_was(two_languages, tokenizer, tmp_path: Path) -> None:
    store = prepare(two_languages, tokenizer, 300, tmp_path / "cache", seed=17)
    for name in ("en", "el"):
        rows = [json.loads(line) for line in Path(two_languages.sets[name].path).read_text().splitlines()]
        held_out = texts(store, tokenizer, name, "held_out")
        train = texts(store, tokenizer, name, "train")
        assert [row["text"] for row in rows if row["text"] in held_out] == held_out
        assert [row["text"] for row in rows if row["text"] not in held_out] == train
        assert held_out and train
    assert len(texts(store, tokenizer, "seen", "held_out")) == 5
    for name in store.sets:
        shard = store.held_out(name)
        assert all(ids[-1] == store.separator_id for ids in documents(shard))


def test_a_page_and_its_translations_are_held_out_together(two_languages, tokenizer, tmp_path: Path) -> None:
    store = prepare(two_languages, tokenizer, 300, tmp_path / "cache", seed=17)
    pages = [document.page for document in store.held_out_documents("en")]
    assert pages == [document.page for document in store.held_out_documents("el")]
    assert 0 < len(pages) < 20
    other = prepare(two_languages, tokenizer, 300, tmp_path / "cache", seed=18)
    assert [document.page for document in other.held_out_documents("en")] != pages


def test_a_set_may_hold_out_more_than_the_others(two_languages, tokenizer, tmp_path: Path) -> None:
    store = prepare(two_languages, tokenizer, 300, tmp_path / "cache", seed=17)
    more = changed(two_languages, new__el__held_out_fraction=0.6)
    other = prepare(more, tokenizer, 300, tmp_path / "cache", seed=17)
    pages = {name: [page.page for page in other.held_out_documents(name)] for name in ("en", "el")}
    assert pages["en"] == [document.page for document in store.held_out_documents("en")]
    assert {*pages["en"]} < {*pages["el"]} and len(pages["el"]) > 20
    assert len(texts(other, tokenizer, "el", "held_out")) == len(pages["el"])


def test_held_out_documents_are_described_in_the_order_of_the_shard(two_languages, tokenizer, tmp_path: Path) -> None:
    store = prepare(two_languages, tokenizer, 300, tmp_path / "cache", seed=17)
    for name in store.sets:
        found = texts(store, tokenizer, name, "held_out")
        described = store.held_out_documents(name)
        assert [document.characters for document in described] == list(map(len, found))
        assert [document.bytes for document in described] == [len(text.encode()) for text in found]
        assert [document.tokens for document in described] == list(store.held_out(name).lengths - 1)
    assert [document.page for document in store.held_out_documents("seen")] == [
        f"watch.jsonl:{n}" for n in range(1, 6)
    ]


def test_tokens_that_are_scored_exclude_bos_and_separator(two_languages, save_tokenizer, tmp_path: Path) -> None:
    folder = save_tokenizer("bos", special=("<s>", "<|endoftext|>"), prepends="<s>")
    store = prepare(two_languages, folder, 300, tmp_path / "cache", seed=17)
    assert store.begins_with_bos
    shard = store.train("el")
    assert all(ids[0] == store.any_manifest.bos_id for ids in documents(shard))
    scored = [document.tokens for document in store.held_out_documents("el")]
    assert scored == list(store.held_out("el").lengths - 2)


def test_the_manifest_counts_what_is_in_the_shards(two_languages, tokenizer, tmp_path: Path) -> None:
    store = prepare(two_languages, tokenizer, 300, tmp_path / "cache", seed=17)
    groups = [(name, entry.group, entry.language) for name, entry in store.statistics.sets.items()]
    assert groups == [("en", "old", "en"), ("el", "new", "el"), ("seen", "watch", "en")]
    for name, one in store.sets.items():
        entry = one.manifest
        for part in ("held_out",) if name == "seen" else ("train", "held_out"):
            shard, counts = getattr(store, part)(name), getattr(entry, part)
            found = texts(store, tokenizer, name, part)
            assert (counts.documents, counts.tokens) == (shard.num_documents, shard.num_tokens)
            assert counts.characters == sum(map(len, found))
            assert counts.bytes == sum(len(text.encode()) for text in found)
        source = Path(entry.sources[0].path)
        assert (entry.sources[0].sha256, entry.sources[0].bytes) == (sha256_file(source), source.stat().st_size)
        assert (entry.dtype, entry.separator, entry.bos_id) == ("uint16", "<|endoftext|>", None)
        files = {str(path.relative_to(one.folder)) for path in one.folder.rglob("*") if path.is_file()}
        assert files == {"manifest.json", *entry.files}
    assert store.sets["seen"].manifest.train is None
    assert store.train("en").dtype == np.uint16
    store.verify()


def test_the_same_content_gives_identical_bytes_and_the_same_key_elsewhere(
    two_languages, tokenizer, tmp_path: Path
) -> None:
    one = prepare(two_languages, tokenizer, 300, tmp_path / "one", seed=17)
    moved = tmp_path / "moved"
    moved.mkdir()
    data = two_languages
    for group, name in (("old", "en"), ("new", "el"), ("watch", "seen")):
        path = shutil.copy(data.sets[name].path, moved / f"{name}2.jsonl")
        data = changed(data, **{f"{group}__{name}__path": str(path)})
    two = prepare(data, str(shutil.copytree(tokenizer, moved / "tokenizer")), 300, tmp_path / "two", seed=17)
    assert two.keys == one.keys
    shards = [name for name in files_of(one) if not name.startswith("seen/held_out.jsonl")]
    assert [files_of(one)[name] for name in shards] == [files_of(two)[name] for name in shards]


@pytest.mark.parametrize(
    "settings",
    [
        {"held_out__fraction": 0.2},
        {"held_out__by": "document"},
        {"held_out__near_copy_threshold": 0.7},
        {"separator": "<sep>"},
    ],
)
def test_a_setting_that_matters_changes_the_key(two_languages, save_tokenizer, tmp_path: Path, settings) -> None:
    folder = save_tokenizer(special=("<|endoftext|>", "<sep>"))
    one = prepare(two_languages, folder, 300, tmp_path / "cache", seed=17)
    two = prepare(changed(two_languages, **settings), folder, 300, tmp_path / "cache", seed=17)
    assert one.keys != two.keys
    one.verify()
    two.verify()


@pytest.mark.parametrize("settings", [{"new__el__weight": 3.0}, {"new__el__language": "ell"}, {"temperature": 2.0}])
def test_a_setting_of_training_or_a_language_does_not_change_the_keys(
    two_languages, tokenizer, tmp_path: Path, settings
) -> None:
    one = prepare(two_languages, tokenizer, 300, tmp_path / "cache", seed=17)
    two = prepare(changed(two_languages, **settings), tokenizer, 300, tmp_path / "cache", seed=17)
    assert two.keys == one.keys


def test_the_same_content_a_second_time_is_not_read_hashed_or_encoded(
    two_languages, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = prepare(two_languages, tokenizer, 300, tmp_path / "cache", seed=17)
    before = {path: path.stat().st_mtime_ns for path in store.folder.rglob("*")}
    capsys.readouterr()

    def forbidden(*arguments: object) -> None:
        raise AssertionError(f"called with {arguments}")

    for called in (
        "data_prep.make_plan.index_file",
        "data_prep.phases.tokenize.read_documents",
        "data_prep.phases.filter.read_documents",
    ):
        monkeypatch.setattr(called, forbidden)
    monkeypatch.setattr(DocumentEncoder, "encode", forbidden)
    again = prepare(two_languages, tokenizer, 300, tmp_path / "cache", seed=17)
    assert again.keys == store.keys
    assert {path: path.stat().st_mtime_ns for path in store.folder.rglob("*")} == before
    assert capsys.readouterr().out == "tokens: en, el, seen: there already, skipped\n"


def test_a_changed_source_is_tokenized_again(two_languages, tokenizer, tmp_path: Path) -> None:
    one = prepare(two_languages, tokenizer, 300, tmp_path / "cache", seed=17)
    with open(two_languages.new["el"].path, "a") as file:
        file.write('{"text": "ένα ακόμη", "page": "one-more"}\n')
    two = prepare(two_languages, tokenizer, 300, tmp_path / "cache", seed=17)
    assert two.keys != one.keys
    found = [store.sets["el"].manifest for store in (one, two)]
    counts = [manifest.train.documents + manifest.held_out.documents for manifest in found]
    assert counts[1] == counts[0] + 1


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.helpers.preparation import prepare
from data_prep.tokenizer import DocumentEncoder
from data_prep.config import DataConfig

encode = DocumentEncoder.encode
def killed_at_english(self, texts, *dtype):
    if any("house" in text for text in texts):
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(self, texts, *dtype)
DocumentEncoder.encode = killed_at_english  # Greek has more bytes and comes first
prepare(DataConfig.model_validate_json(sys.argv[1]), sys.argv[2], 300, Path(sys.argv[3]), 17)
"""


def test_a_killed_run_leaves_nothing_complete_and_the_next_one_does_it_all(
    two_languages, tokenizer, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    arguments = [two_languages.model_dump_json(), tokenizer, str(cache)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False, env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert list(cache.rglob("*.train.idx")), "it was killed after the first slice was written"
    assert list(cache.rglob("manifest.json")) == []
    assert [path for path in (cache / "tokens").iterdir() if not path.name.startswith(".")] == []
    store = prepare(two_languages, tokenizer, 300, cache, seed=17)
    assert files_of(store) == files_of(prepare(two_languages, tokenizer, 300, tmp_path / "other", seed=17))
    assert {path.name for path in set_folders(cache)} == set(store.keys.values())


def test_an_error_midway_leaves_nothing_complete(
    two_languages, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(DocumentEncoder, "encode", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare(two_languages, tokenizer, 300, tmp_path / "cache", seed=17)
    assert list((tmp_path / "cache" / "tokens").glob("[!.]*")) == []


def test_the_next_run_removes_work_whose_removal_was_interrupted(
    two_languages, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = shutil.rmtree

    def interrupted(folder: Path, **options: Any) -> None:
        if not (folder / "plan.json").is_file():
            return remove(folder, **options)
        (folder / "plan.json").unlink()
        raise KeyboardInterrupt

    tokens = tmp_path / "cache" / "tokens"
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(two_languages, tokenizer, 300, tmp_path / "cache", seed=17)
    assert len(list(tokens.glob(".*.work"))) == 1
    prepare(two_languages, tokenizer, 300, tmp_path / "cache", seed=17)
    assert list(tokens.glob(".*.work")) == []


def test_near_copies_of_held_out_and_watched_text_are_kept_out_of_training(
    two_languages, write_rows, tokenizer, tmp_path: Path
) -> None:
    store = prepare(two_languages, tokenizer, 300, tmp_path / "cache", seed=17)
    held_out = texts(store, tokenizer, "el", "held_out")[0]
    watched = texts(store, tokenizer, "seen", "held_out")[0]
    trained = texts(store, tokenizer, "el", "train")[0]
    # Names of pages that are not held out, so that only the likeness can keep the texts out.
    pages = [f"page-{n}" for n in range(60)]
    free = [page for page in pages if page not in {d.page for d in store.held_out_documents("el")}]
    copies = [held_out.upper(), watched + "!", trained, "  "]
    rows = [json.loads(line) for line in Path(two_languages.new["el"].path).read_text().splitlines()]
    more = [{"text": text, "page": page} for text, page in zip(copies, free, strict=False)]
    data = changed(two_languages, new__el__path=str(write_rows("more.jsonl", rows + more)))
    found = prepare(data, tokenizer, 300, tmp_path / "cache", seed=17)
    assert texts(found, tokenizer, "el", "train") == [*texts(store, tokenizer, "el", "train"), trained]
    assert texts(found, tokenizer, "el", "held_out") == texts(store, tokenizer, "el", "held_out")
    dropped = found.sets["el"].manifest.dropped
    assert (dropped["near_copy"].documents, dropped["near_copy"].characters) == (2, len(held_out) + len(watched) + 1)
    assert (dropped["empty"].documents, dropped["empty"].characters) == (1, 2)


def test_by_document_needs_no_page_and_keeps_equal_texts_together(write_rows, tokenizer, tmp_path: Path) -> None:
    rows = [{"text": f"document {n // 2} of many, {n // 2} it is"} for n in range(200)]
    data = DataConfig.model_validate(
        {"held_out": {"fraction": 0.1}, "new": {"en": {"path": str(write_rows("a.jsonl", rows))}}}
    )
    store = prepare(data, tokenizer, 300, tmp_path / "cache", seed=17)
    held_out, train = (texts(store, tokenizer, "en", part) for part in ("held_out", "train"))
    assert held_out and train
    assert not set(held_out) & set(train)
    assert all(held_out.count(text) == 2 for text in held_out)
