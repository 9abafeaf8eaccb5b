"""SentencePiece files, with the real models of mistral-common. Run: pytest tests/data_prep/test_sentencepiece.py"""

from pathlib import Path
from typing import Any

import mistral_common
import pytest
import sentencepiece
from tokenizers import normalizers, processors
from transformers import LlamaTokenizerFast, PreTrainedTokenizerFast

from common.errors import UserError
from data_prep.config import DataConfig
from data_prep.tokenizer import DocumentEncoder, load_decoder
from tests.data_prep.conftest import pages
from tests.helpers.preparation import documents, prepare

MODELS = sorted((Path(mistral_common.__file__).parent / "data").glob("*.model.v[1-3]"))
TEXTS = [
    "The quick brown fox.",
    "Η γρήγορη καφέ αλεπού πηδά πάνω από το σκυλί.",
    "  two spaces, a\ttab and\nnew lines\n\n",
    "日本語 and 中文, emoji 🦊 and ﬁ ligature",
    "a text that spells </s> and <s> and [INST]",
    "x",
]


@pytest.mark.parametrize("model", MODELS, ids=[path.name for path in MODELS])
def test_ids_are_the_librarys_own(model: Path) -> None:
    encoder = DocumentEncoder.create(str(model), "auto", 32768)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ids = [document.tolist() for document in encoder.encode(TEXTS)]
    assert ids == [[theirs.bos_id(), *theirs.encode(text), theirs.eos_id()] for text in TEXTS]
    assert encoder.spec.separator == "</s>" and encoder.spec.num_added == 2
    assert all(ids_of.count(theirs.eos_id()) == 1 for ids_of in ids)


def test_ids_are_the_fast_tokenizers_too(tmp_path: Path) -> None:
    model = next(path for path in MODELS if path.name == "tokenizer.model.v1")
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    # transformers converts the pieces and merges; the rest is as in the tokenizer.json that Mistral publishes.
    converted = LlamaTokenizerFast.from_pretrained(tmp_path)
    backend = converted.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(
        tmp_path / "fast"
    )
    ours = DocumentEncoder.create(str(model), "auto", 32768)
    fast = DocumentEncoder.create(str(tmp_path / "fast"), "auto", 32768)
    assert (fast.spec.kind, ours.spec.kind) == ("fast", "sentencepiece")
    assert (fast.spec.separator_id, fast.spec.bos_id) == (ours.spec.separator_id, ours.spec.bos_id)
    plain = [text for text in TEXTS if "<s>" not in text]
    assert [ids.tolist() for ids in fast.encode(plain)] == [ids.tolist() for ids in ours.encode(plain)]


def test_a_store_is_made_with_a_sentencepiece_file_and_can_be_read_as_text(write_rows: Any, tmp_path: Path) -> None:
    rows = pages("el", 60)
    tree = {"held_out": {"fraction": 0.1}, "new": {"el": {"path": str(write_rows("el.jsonl", rows))}}}
    store = prepare(DataConfig.model_validate(tree), str(MODELS[-1]), 32768, tmp_path / "cache", seed=17)
    shards = store.train("el")
    decode = load_decoder(store.sets["el"].folder)
    found = {decode(ids.tolist()) for ids in documents(shards)}
    assert found < {row["text"] for row in rows}
    assert len(found) == shards.num_documents > 40
    assert store.begins_with_bos
    store.verify()


def test_a_file_that_is_no_model_and_an_unknown_separator_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"x\.model: not a SentencePiece model"):
        DocumentEncoder.create(str(tmp_path / "x.model"), "auto", 32768)
    with pytest.raises(UserError, match=r"'<eod>' is not a token"):
        DocumentEncoder.create(str(MODELS[0]), "<eod>", 32768)
    with pytest.raises(UserError, match=r"the model's vocabulary ends at 999"):
        DocumentEncoder.create(str(MODELS[0]), "auto", 1000)
