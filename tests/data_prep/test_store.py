"""Run: pytest tests/data_prep/test_store.py"""

from pathlib import Path

import pytest

from common.errors import UserError
from data_prep.prepare import prepare
from data_prep.store import TokenStore


@pytest.fixture
def store(two_languages, save_tokenizer, tmp_path: Path) -> TokenStore:
    return prepare(two_languages, save_tokenizer(), 300, tmp_path / "cache", seed=17)


def test_opening_the_folder_again_gives_the_same_manifest(store: TokenStore) -> None:
    assert TokenStore(store.folder).manifest == store.manifest
    assert store.key == store.folder.name


@pytest.mark.parametrize("name", ["en/train/00000.bin", "el/held_out.jsonl"])
def test_verify_names_a_file_whose_bytes_have_changed(store: TokenStore, name: str) -> None:
    path = store.folder / name
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: damaged"):
        store.verify()
    path.unlink()
    with pytest.raises(UserError, match=rf"{name}: missing"):
        store.verify()


def test_a_folder_without_a_manifest_is_not_complete(store: TokenStore) -> None:
    (store.folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest\.json: missing, so these tokens are not complete"):
        TokenStore(store.folder)


@pytest.mark.parametrize("content", ["{", '{"key": "x"}'])
def test_a_foreign_manifest_is_an_error_of_one_line(store: TokenStore, content: str) -> None:
    (store.folder / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json: ") as raised:
        TokenStore(store.folder)
    assert "\n" not in str(raised.value)


def test_an_unknown_set_and_the_training_part_of_a_watch_set_are_errors(store: TokenStore) -> None:
    with pytest.raises(UserError, match=r"no set 'tr' in .*: it holds en, el, seen"):
        store.held_out("tr")
    with pytest.raises(UserError, match=r"data\.watch\.seen: a watch set is scored, never trained on"):
        store.train("seen")
