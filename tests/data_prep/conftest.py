"""What the tests of data_prep share: a tiny byte-level tokenizer, and writers of small corpora."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from data_prep.config import DataConfig
from data_prep.store import TokenStore
from tests.helpers.preparation import prepare

VOCAB_SIZE = 300
TRAINING_TEXT = ["the quick brown fox jumps over the lazy dog", "η γρήγορη καφέ αλεπού", "a hosszú nyári délután"] * 20

SaveTokenizer = Callable[..., str]
Tree = dict[str, Any]
WriteRows = Callable[[str, Iterable[dict[str, Any]]], Path]


@pytest.fixture
def save_tokenizer(tmp_path: Path) -> SaveTokenizer:
    """save_tokenizer(name, special=[…], eos=None, prepends=None): a byte-level BPE of at most 300 ids; its folder."""

    def save(
        name: str = "tokenizer",
        special: tuple[str, ...] = ("<|endoftext|>",),
        eos: str | None = None,
        prepends: str | None = None,
    ) -> str:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=list(special),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
        if prepends is not None:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{prepends} $A", special_tokens=[(prepends, tokenizer.token_to_id(prepends))]
            )
        folder = tmp_path / name
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=prepends).save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    """write_rows(name, rows): a .jsonl in the test's folder; its path."""

    def write(name: str, rows: Iterable[dict[str, Any]]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def pages(language: str, count: int) -> list[dict[str, Any]]:
    """`count` different documents named page-0, page-1, …, the same names in every language."""
    words = {"en": "house river stone bread", "el": "σπίτι ποτάμι πέτρα ψωμί", "hu": "ház folyó kő kenyér"}[language]
    return [
        {"text": " ".join(f"{word}{n} {word}{n * n + 1}" for word in words.split()), "page": f"page-{n}"}
        for n in range(count)
    ]


@pytest.fixture
def two_languages(write_rows: WriteRows) -> DataConfig:
    """English (old) and Greek (new), 60 translated pages each, and a watch set; a tenth held out by page."""
    watch = [{"text": f"watched sentence number {n} of the set"} for n in range(5)]
    return DataConfig.model_validate(
        {
            "held_out": {"by": "page", "fraction": 0.1},
            "old": {"en": {"path": str(write_rows("en.jsonl", pages("en", 60)))}},
            "new": {"el": {"path": str(write_rows("el.jsonl", pages("el", 60)))}},
            "watch": {"seen": {"path": str(write_rows("watch.jsonl", watch)), "language": "en"}},
        }
    )


@pytest.fixture
def tokenizer(save_tokenizer) -> str:
    return save_tokenizer()


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
