"""Figures of a set, its page, and what inspect and verify print.

Run: pytest tests/data_prep/statistics/test_statistics.py
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import LlamaConfig

from common.errors import UserError
from common.settings import load_settings
from data_prep.config import DataConfig, PreparationConfig
from data_prep.prepare import prepare as prepare_config
from data_prep.shards import Shard
from data_prep.statistics.page import write_page
from data_prep.statistics.show_samples import inspect_sets, open_sets
from data_prep.statistics.tally import Tally, fertility_warning, part_statistics
from data_prep.store import TokenStore
from tests.data_prep.conftest import pages
from tests.helpers.preparation import changed, prepare
from tests.helpers.preparation_jobs import ROOT


@pytest.fixture
def store(two_languages: DataConfig, save_tokenizer: Any, tmp_path: Path) -> TokenStore:
    data = two_languages.model_copy(update={"slice_bytes": 2000})
    return prepare(data, save_tokenizer(), 300, tmp_path / "cache", seed=17)


def test_figures_are_those_of_the_documents(store: TokenStore) -> None:
    for name, entry in store.statistics.sets.items():
        for part, shards in (
            (entry.train, store.train(name) if entry.train else None),
            (entry.held_out, store.held_out(name)),
        ):
            if part is None or shards is None:
                continue
            assert (part.documents, part.tokens) == (shards.num_documents, shards.num_tokens)
            text_tokens = part.tokens - part.documents
            assert part.characters_per_token == pytest.approx(part.characters / text_tokens, abs=1e-4)
            assert part.bytes_per_token == pytest.approx(part.bytes / text_tokens, abs=1e-4)
            assert sum(found.documents for found in part.lengths) == part.documents
            parts = [shards] if isinstance(shards, Shard) else list(shards.shards())
            lengths = np.concatenate([shard.lengths for shard in parts])
            for found in part.lengths:
                assert ((lengths >= found.least) & (lengths <= found.most)).sum() == found.documents
    english = store.statistics.sets["en"].train
    assert english is not None
    # Each made-up page has eight words: fertility is tokens over eight a page.
    assert english.fertility == pytest.approx((english.tokens - english.documents) / (8 * english.documents), abs=1e-3)


def test_a_tally_counts_words_by_script_and_merges() -> None:
    parts = [Tally(), Tally()]
    parts[0].add("δύο λέξεις", 7, 1)
    parts[1].add("透视表中", 9, 1)
    whole = Tally()
    for part in parts:
        whole.merge(part.as_json())
    statistics = part_statistics(whole)
    assert statistics.fertility == pytest.approx((6 + 8) / (2 + 4), abs=1e-4)
    assert statistics.words_without_spaces == pytest.approx(4 / 6, abs=1e-4)
    assert [(b.least, b.most, b.documents) for b in statistics.lengths] == [(4, 7, 1), (8, 15, 1)]


@pytest.mark.parametrize(
    ("text", "tokens", "warns"),
    [("two words", 3, False), ("two words", 9, True), ("透视表中", 3, False), ("透视表中", 8, True)],
)
def test_a_warning_says_where_the_tokenizer_hardly_knows_a_language(text: str, tokens: int, warns: bool) -> None:
    tally = Tally()
    tally.add(text, tokens + 1, 1)
    warning = fertility_warning("el", "Greek", part_statistics(tally))
    assert (warning is not None) is warns
    if warning is not None:
        assert "hardly knows Greek" in warning


def test_a_watch_set_is_warned_of_where_no_set_of_its_language_is_trained_on(
    store: TokenStore, two_languages: DataConfig, save_tokenizer: Any, tmp_path: Path
) -> None:
    warnings = {name: entry.warning for name, entry in store.statistics.sets.items()}
    assert warnings["en"] and two_languages.sets["seen"].language == "en" and warnings["seen"] is None
    other = changed(two_languages, watch__seen__language="fr")
    alone = prepare(other, save_tokenizer(), 300, tmp_path / "cache", seed=17)
    assert "hardly knows fr" in (alone.statistics.sets["seen"].warning or "")


def test_the_page_shows_every_set_and_loads_nothing_from_elsewhere(store: TokenStore) -> None:
    [page_of_the_list] = store.folder.glob("*.html")
    write_page(store, store.folder / "elsewhere" / "tokens.html")
    page = (store.folder / "elsewhere" / "tokens.html").read_text(encoding="utf-8")
    assert page == page_of_the_list.read_text(encoding="utf-8")
    for name, entry in store.statistics.sets.items():
        assert f"<td>{name}" in page
        assert f"{entry.held_out.tokens:,}" in page
    assert "hardly knows el" in page
    assert "default-src 'none'" in page
    assert 'src="http' not in page and 'href="http' not in page.split("<script>", 1)[0]
    assert page.count('id="chart-') == 3


def test_inspect_shows_text_with_its_language(store: TokenStore, capsys: pytest.CaptureFixture[str]) -> None:
    sets = {"OLD en, language en": store.sets["en"], "NEW el, language el": store.sets["el"]}
    capsys.readouterr()
    inspect_sets(sets, "el", 2, 40)
    out = capsys.readouterr().out
    assert out.count("--- NEW el, language el, tokens ") == 2
    assert "σπίτι" in out or "ποτάμι" in out
    assert "OLD en" not in out
    with pytest.raises(UserError, match="--only xx: no such set; there are en, el"):
        inspect_sets(sets, "xx", 1, 10)
    folder = store.sets["el"].folder
    assert list(open_sets(str(folder), [])) == [folder.name]


def test_inspect_opens_the_sets_of_a_run(save_tokenizer: Any, tmp_path: Path, write_rows: Any) -> None:
    tokenizer = save_tokenizer()
    LlamaConfig(vocab_size=300).save_pretrained(tokenizer)
    tree = {
        "model": {"path": tokenizer},
        "cache_dir": str(tmp_path / "cache"),
        "data": {
            "held_out": {"by": "page", "fraction": 0.1},
            "new": {"greek": {"path": str(write_rows("el.jsonl", pages("el", 60))), "language": "el"}},
        },
    }
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match="not all its sets are in .*; prepare them: python -m data_prep"):
        open_sets(str(run), [])
    prepare_config(load_settings(PreparationConfig, run), "local")
    assert list(open_sets(str(run), [])) == ["NEW greek, language el"]


@pytest.mark.parametrize("damage", [None, "byte", "index"])
def test_verify_checks_hashes_and_indices(store: TokenStore, damage: str | None) -> None:
    folder = store.sets["el"].folder
    path = folder / "train" / ("00001.idx" if damage == "index" else "00001.bin")
    if damage:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    command = [sys.executable, "-m", "data_prep", "verify", str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == (2 if damage else 0), done.stderr
    assert ("damaged" in done.stderr) if damage else ("every file is as it was written" in done.stdout)
