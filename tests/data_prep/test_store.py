"""Run: pytest tests/data_prep/test_store.py"""

from pathlib import Path

import pytest

from common.errors import UserError
from data_prep.store import TokenSet, TokenStore
from tests.helpers.preparation import prepare


@pytest.fixture
def store(two_languages, save_tokenizer, tmp_path: Path) -> TokenStore:
    return prepare(two_languages, save_tokenizer(), 300, tmp_path / "cache", seed=17)


def test_opening_a_folder_again_gives_the_same_manifest_and_its_name_is_the_key(store: TokenStore) -> None:
    for name, one in store.sets.items():
        assert TokenSet(one.folder).manifest == one.manifest
        assert one.manifest.key == one.folder.name == store.keys[name]


@pytest.mark.parametrize("name", ["train/00000.bin", "held_out.jsonl", "held_out_runs.npy"])
def test_verify_names_a_file_whose_bytes_have_changed(store: TokenStore, name: str) -> None:
    path = store.sets["el"].folder / name
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: damaged"):
        store.verify()
    path.unlink()
    with pytest.raises(UserError, match=rf"{name}: missing"):
        store.verify()


def test_a_folder_without_a_manifest_is_not_complete(store: TokenStore) -> None:
    folder = store.sets["en"].folder
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest\.json: missing, so these tokens are not complete"):
        TokenSet(folder)
    with pytest.raises(UserError, match=r"manifest\.json: missing, so these tokens are not complete"):
        TokenStore(store.folder, store.data, store.keys)


def test_a_run_with_a_set_that_is_not_prepared_names_it(store: TokenStore) -> None:
    with pytest.raises(UserError, match=r"data\.new\.el: not prepared yet; run tokenize again"):
        TokenStore(store.folder, store.data, {name: key for name, key in store.keys.items() if name != "el"})


@pytest.mark.parametrize("content", ["{", '{"key": "x"}'])
def test_a_foreign_manifest_is_an_error_of_one_line(store: TokenStore, content: str) -> None:
    folder = store.sets["en"].folder
    (folder / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json: ") as raised:
        TokenSet(folder)
    assert "\n" not in str(raised.value)


def test_an_unknown_set_and_the_training_part_of_a_watch_set_are_errors(store: TokenStore) -> None:
    with pytest.raises(UserError, match=r"no set 'tr' in this run: it has en, el, seen"):
        store.held_out("tr")
    with pytest.raises(UserError, match=r"data\.watch\.seen: a watch set is scored, never trained on"):
        store.train("seen")
