"""Each filter, and what the manifest says of it. Run: pytest tests/data_prep/test_filters.py"""

import unicodedata
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from common.errors import UserError
from data_prep.config import DataConfig
from data_prep.store import TokenStore
from tests.helpers.preparation import documents, prepare

ENGLISH = [f"The river runs slowly past the old stone house number {n}, and nobody knows its name." for n in range(30)]
GREEK = [
    f"Το ποτάμι κυλά αργά δίπλα στο παλιό πέτρινο σπίτι με αριθμό {n} και κανείς δεν το ξέρει." for n in range(30)
]


def stored(write_rows: Any, save_tokenizer: Any, folder: Path, texts: list[str], **data: Any) -> TokenStore:
    path = write_rows("el.jsonl", [{"text": text} for text in texts])
    # These texts are much alike, so that held-out ones would have near copies.
    held_out = {"fraction": 0.1, "near_copy_threshold": None}
    tree = {"held_out": held_out, "new": {"el": {"path": str(path)}}} | data
    return prepare(DataConfig.model_validate(tree), save_tokenizer(), 300, folder / "cache", seed=17)


def texts_of(store: TokenStore) -> set[str]:
    tokenizer = AutoTokenizer.from_pretrained(store.any_manifest.tokenizer)
    shards = [store.train("el"), store.held_out("el")]
    return {tokenizer.decode(ids[:-1]) for s in shards for ids in documents(s)}


def test_text_is_normalised_and_mojibake_repaired(write_rows: Any, save_tokenizer: Any, tmp_path: Path) -> None:
    split = [unicodedata.normalize("NFD", text) for text in GREEK]
    broken = "Το σπίτι και το ποτάμι".encode().decode("latin-1")
    filters = {"normalize": "NFC", "fix_text": True}
    store = stored(write_rows, save_tokenizer, tmp_path, [*split, broken], filters=filters)
    assert texts_of(store) == {*GREEK, "Το σπίτι και το ποτάμι"}
    assert store.sets["el"].manifest.dropped == {}


def test_lengths_are_in_characters(write_rows: Any, save_tokenizer: Any, tmp_path: Path) -> None:
    filters = {"min_characters": 5, "max_characters": 300}
    store = stored(write_rows, save_tokenizer, tmp_path, [*GREEK, "αβγδ", "αβγδε", "x" * 301], filters=filters)
    dropped = store.sets["el"].manifest.dropped
    assert {reason: (d.documents, d.characters) for reason, d in dropped.items()} == {
        "too_short": (1, 4),
        "too_long": (1, 301),
    }
    assert dropped["too_short"].examples == [f"{tmp_path}/el.jsonl, row 31"]


def test_documents_in_another_language_are_dropped(write_rows: Any, save_tokenizer: Any, tmp_path: Path) -> None:
    store = stored(write_rows, save_tokenizer, tmp_path, [*GREEK, *ENGLISH[:7]], filters={"language": {}})
    assert store.sets["el"].manifest.dropped["language"].documents == 7
    assert texts_of(store) == set(GREEK)
    assert "py3langid" in str(store.any_manifest.settings["text"])


def test_a_set_may_have_another_label_than_its_language(write_rows: Any, save_tokenizer: Any, tmp_path: Path) -> None:
    path = write_rows("a.jsonl", [{"text": text} for text in GREEK])
    entry = {"path": str(path), "language": "ell", "language_label": "el"}
    held_out = {"fraction": 0.1, "near_copy_threshold": None}
    tree = {"held_out": held_out, "new": {"greek": entry}, "filters": {"language": {}}}
    store = prepare(DataConfig.model_validate(tree), save_tokenizer(), 300, tmp_path / "cache", seed=17)
    assert store.sets["greek"].manifest.dropped == {}


def test_a_fasttext_model_says_the_language(write_rows: Any, save_tokenizer: Any, tmp_path: Path) -> None:
    model = Path(__file__).with_name("tiny_language_model.bin")  # trained on help pages, with GlotLID's labels
    path = write_rows("a.jsonl", [{"text": text} for text in [*GREEK, *ENGLISH[:7]]])
    tree = {
        "held_out": {"fraction": 0.1, "near_copy_threshold": None},
        "new": {"el": {"path": str(path), "language_label": "ell_Grek"}},
        "filters": {"language": {"identifier": str(model), "threshold": 0.6}},
    }
    store = prepare(DataConfig.model_validate(tree), save_tokenizer(), 300, tmp_path / "cache", seed=17)
    assert store.sets["el"].manifest.dropped["language"].documents == 7
    assert texts_of(store) == set(GREEK)
    tree["new"] = {"el": {"path": str(path)}}
    with pytest.raises(UserError, match=r"'el' is not one that .*tiny_language_model\.bin knows \(ell_Grek\)"):
        prepare(DataConfig.model_validate(tree), save_tokenizer(), 300, tmp_path / "cache", seed=17)
    (tmp_path / "no.bin").write_bytes(b"no model")
    tree["filters"] = {"language": {"identifier": str(tmp_path / "no.bin")}}
    with pytest.raises(UserError, match=r"no\.bin is not a fastText model"):
        prepare(DataConfig.model_validate(tree), save_tokenizer(), 300, tmp_path / "cache", seed=17)


def test_a_fasttext_model_that_is_not_there_is_named(write_rows: Any, save_tokenizer: Any, tmp_path: Path) -> None:
    filters = {"language": {"identifier": "none/model.bin"}}
    with pytest.raises(UserError, match=r"data\.filters\.language\.identifier: none/model\.bin is not a file"):
        stored(write_rows, save_tokenizer, tmp_path, GREEK, filters=filters)


def test_what_contains_or_copies_a_benchmark_is_dropped(write_rows: Any, save_tokenizer: Any, tmp_path: Path) -> None:
    question = "What is the name of the old stone house by the slow river that nobody in the village ever visited"
    benchmark = write_rows("bench.jsonl", [{"question": question}, {"question": "Which river is it?"}])
    page = " ".join(GREEK) + " " + question.upper() + "? " + " ".join(ENGLISH)
    different = [" ".join(f"λέξη{n * k % 997}" for k in range(1, 40)) for n in range(1, 100)]
    texts = [*different, page, question, "Which river is it? " + GREEK[0]]
    store = stored(
        write_rows, save_tokenizer, tmp_path, texts,
        held_out={"fraction": 0.02, "near_copy_threshold": 0.9},
        benchmarks={"quiz": {"path": str(benchmark), "text_field": "question"}},
    )  # fmt: skip
    dropped = store.sets["el"].manifest.dropped
    assert dropped["benchmark"].documents == 2  # a short question within a text is not a copy of it
    assert "quiz" not in store.sets
    assert dropped["benchmark"].examples == [f"{tmp_path}/el.jsonl, row {row}" for row in (100, 101)]


def test_held_out_megabytes_lower_the_fraction(
    write_rows: Any, save_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"{n} " + "text of some length " * 200 for n in range(1500)]
    held_out = {"fraction": 0.9, "max_megabytes": 1, "near_copy_threshold": None}
    store = stored(write_rows, save_tokenizer, tmp_path, texts, held_out=held_out)
    assert 0.7e6 < store.sets["el"].manifest.held_out.bytes < 1.4e6
    assert "data.held_out.fraction is lowered to 0.1" in capsys.readouterr().out
