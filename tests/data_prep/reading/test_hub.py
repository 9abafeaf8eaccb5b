"""Hugging Face datasets as streams. Run: pytest tests/data_prep/reading/test_hub.py

There is no network in tests, so a dataset is a folder laid out as a repository, or lies in the cache of downloads as
`huggingface_hub` lays it out: from there on the code is what reads the hub. Streaming from the hub itself is not
tested.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.errors import UserError
from common.settings import parse_settings
from data_prep.config import DataConfig, PreparationConfig
from data_prep.reading.hub import HubSource, hub_sources
from tests.data_prep.conftest import pages
from tests.helpers.preparation import prepare

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_repository(folder: Path) -> Path:
    """A dataset of two configurations, each of several files."""
    for config in ("el", "hu"):
        rows = pages(config, 60)
        (folder / config).mkdir(parents=True)
        for number in range(3):
            table = pa.Table.from_pylist([*rows[number * 20 : number * 20 + 20]])
            pq.write_table(table, folder / config / f"train-{number:05d}-of-00003.parquet")
    configs = "".join(
        f"- config_name: {c}\n  data_files:\n  - split: train\n    path: {c}/train-*\n" for c in ("el", "hu")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return folder


def data_of(hub: str, **more: Any) -> DataConfig:
    new = {"el": {"hub": hub, "config": "el", **more}, "hu": {"hub": hub, "config": "hu", **more}}
    return DataConfig.model_validate({"held_out": {"by": "page", "fraction": 0.1}, "new": new})


def test_a_dataset_is_read_a_file_a_slice(save_tokenizer: Any, tmp_path: Path) -> None:
    folder = write_repository(tmp_path / "repo")
    store = prepare(data_of(str(folder)), save_tokenizer(), 300, tmp_path / "cache", seed=17, workers=1)
    for name in ("el", "hu"):
        entry = store.sets[name].manifest
        assert entry.train is not None
        assert entry.slices == 3
        assert entry.train.documents + entry.held_out.documents == 60
    rows = {name: [json.dumps(row) for row in pages(name, 60)] for name in ("el", "hu")}
    assert rows["el"] != rows["hu"]
    assert store.sets["el"].manifest.sources[0].path.endswith(":el:train")
    store.verify()


def test_a_dataset_gives_the_tokens_that_its_files_give(save_tokenizer: Any, tmp_path: Path) -> None:
    folder = write_repository(tmp_path / "repo")
    tokenizer = save_tokenizer()
    streamed = prepare(data_of(str(folder)), tokenizer, 300, tmp_path / "cache", seed=17, workers=1)
    tree = {"held_out": {"by": "page", "fraction": 0.1}}
    tree["new"] = {name: {"path": str(folder / name)} for name in ("el", "hu")}
    read = prepare(DataConfig.model_validate(tree), tokenizer, 300, tmp_path / "cache", seed=17)
    for name in ("el", "hu"):
        ids = [store.train(name).read(0, len(store.train(name))).tolist() for store in (streamed, read)]
        assert ids[0] == ids[1]


def test_a_dataset_in_the_cache_of_downloads_is_read_from_there(
    save_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "datasets--owner--name"
    write_repository(folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    store = prepare(data_of("owner/name"), save_tokenizer(), 300, tmp_path / "cache", seed=17, workers=1)
    assert store.sets["el"].manifest.sources[0].path == f"owner/name@{COMMIT}:el:train"
    train = store.sets["el"].manifest.train
    assert train is not None and train.documents > 40


def test_only_the_named_files_of_a_dataset_are_read(save_tokenizer: Any, tmp_path: Path) -> None:
    folder = write_repository(tmp_path / "repo")
    files = {name: [f"{name}/train-{number:05d}-of-00003.parquet" for number in (2, 0)] for name in ("el", "hu")}
    data = data_of(str(folder))
    new = {name: entry.model_copy(update={"data_files": files[name]}) for name, entry in data.new.items()}
    store = prepare(data.model_copy(update={"new": new}), save_tokenizer(), 300, tmp_path / "cache", 17, workers=1)
    whole = prepare(data, save_tokenizer("same"), 300, tmp_path / "cache", 17, workers=1)
    for name in ("el", "hu"):
        entry = store.sets[name].manifest
        assert entry.train is not None and entry.train.documents + entry.held_out.documents == 40
        assert whole.keys[name] != store.keys[name]


def test_a_dataset_that_is_nowhere_is_named(save_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"owner/nothing: not in the cache of downloads, .* fetch it") as raised:
        prepare(data_of("owner/nothing"), save_tokenizer(), 300, tmp_path / "cache", seed=17)
    assert "\n" not in str(raised.value)
    folder = write_repository(tmp_path / "repo")
    data = DataConfig.model_validate({"new": {"el": {"hub": str(folder), "config": "nope"}}})
    with pytest.raises(UserError, match="can't be opened .*check hub, config, split and revision"):
        prepare(data, save_tokenizer(), 300, tmp_path / "cache", seed=17)


def test_a_missing_field_of_a_dataset_is_named(save_tokenizer: Any, tmp_path: Path) -> None:
    folder = write_repository(tmp_path / "repo")
    with pytest.raises(UserError, match=r":el:train#\d, row 1: no text field 'content'"):
        prepare(data_of(str(folder), text_field="content"), save_tokenizer(), 300, tmp_path / "cache", seed=17)


def test_the_hub_datasets_of_a_run_are_listed_once_each() -> None:
    tree = {
        "name": "x",
        "model": {"path": "m"},
        "data": {
            "old": {"en": {"sources": [{"hub": "a/b", "config": "en", "revision": "r"}, {"path": "x.jsonl"}]}},
            "new": {"el": {"hub": "a/b", "config": "el"}, "hu": {"hub": "c/d", "split": "validation"}},
            "watch": {"w": {"hub": "c/d", "split": "validation", "language": "hu"}},
            "benchmarks": {"quiz": {"hub": "e/f", "split": "test"}},
        },
        "experts": {"num_new": 4},
        "stage1": {"tokens": 10**7},
    }
    assert hub_sources(parse_settings(PreparationConfig, tree, "x").data) == [
        HubSource("a/b", "en", "train", "r"),
        HubSource("a/b", "el", "train", None),
        HubSource("c/d", None, "validation", None),
        HubSource("e/f", None, "test", None),
    ]
