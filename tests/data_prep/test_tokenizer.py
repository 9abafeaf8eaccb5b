"""Run: pytest tests/data_prep/test_tokenizer.py"""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from common.errors import UserError
from data_prep.tokenizer import DocumentEncoder, dtype_of


def test_a_document_is_its_text_and_the_separator(save_tokenizer) -> None:
    folder = save_tokenizer()
    encoder = DocumentEncoder.create(folder, "auto", 300)
    theirs = AutoTokenizer.from_pretrained(folder)
    texts = ["the quick fox", "η αλεπού", " ", "日本"]
    ids = encoder.encode(texts)
    assert [list(i) for i in ids] == [[*theirs(text).input_ids, encoder.spec.separator_id] for text in texts]
    assert theirs.convert_ids_to_tokens(encoder.spec.separator_id) == "<|endoftext|>"
    assert (encoder.spec.bos_id, encoder.spec.num_added) == (None, 1)
    assert theirs.decode(ids[1][:-1]) == "η αλεπού"


def test_bos_comes_first_where_the_tokenizer_prepends_one(save_tokenizer) -> None:
    folder = save_tokenizer(special=("<s>", "<|end_of_text|>"), prepends="<s>")
    encoder = DocumentEncoder.create(folder, "auto", 300)
    theirs = AutoTokenizer.from_pretrained(folder)
    [ids] = encoder.encode(["a fox"])
    assert list(ids) == [*theirs("a fox").input_ids, encoder.spec.separator_id]
    assert ids[0] == encoder.spec.bos_id == theirs.bos_token_id
    assert (encoder.spec.separator, encoder.spec.num_added) == ("<|end_of_text|>", 2)


def test_no_bos_comes_first_where_none_is_wanted(save_tokenizer) -> None:
    folder = save_tokenizer(special=("<s>", "<|end_of_text|>"), prepends="<s>")
    with_bos = DocumentEncoder.create(folder, "auto", 300)
    encoder = DocumentEncoder.create(folder, "auto", 300, begins_with_bos=False)
    assert list(encoder.encode(["a fox"])[0]) == list(with_bos.encode(["a fox"])[0])[1:]
    assert (encoder.spec.bos_id, encoder.spec.num_added) == (None, 1)
    assert encoder.spec.key != with_bos.spec.key


def test_a_text_that_spells_a_special_token_stays_text(save_tokenizer) -> None:
    encoder = DocumentEncoder.create(save_tokenizer(), "auto", 300)
    [ids] = encoder.encode(["the token <|endoftext|> ends a document"])
    assert list(ids).count(encoder.spec.separator_id) == 1


def test_auto_separator_is_pretrainings_before_eos(save_tokenizer) -> None:
    both = save_tokenizer("both", special=("<|im_end|>", "<|endoftext|>"), eos="<|im_end|>")
    assert DocumentEncoder.create(both, "auto", 300).spec.separator == "<|endoftext|>"
    only_eos = save_tokenizer("only_eos", special=("<|im_end|>",), eos="<|im_end|>")
    assert DocumentEncoder.create(only_eos, "auto", 300).spec.separator == "<|im_end|>"


def test_a_named_separator_is_used_and_an_unknown_one_is_an_error(save_tokenizer) -> None:
    folder = save_tokenizer(special=("<|endoftext|>", "<sep>"))
    assert DocumentEncoder.create(folder, "<sep>", 300).spec.separator == "<sep>"
    with pytest.raises(UserError, match=r"data\.separator: '<nope>' is not a token"):
        DocumentEncoder.create(folder, "<nope>", 300)


def test_no_separator_at_all_is_an_error(save_tokenizer) -> None:
    with pytest.raises(UserError, match=r"data\.separator: .* no eos token"):
        DocumentEncoder.create(save_tokenizer(special=()), "auto", 300)


def test_ids_beyond_the_models_vocabulary_are_an_error(save_tokenizer) -> None:
    with pytest.raises(UserError, match=r"ids up to 299 but the model's vocabulary ends at 298; set data\.tokenizer"):
        DocumentEncoder.create(save_tokenizer(), "auto", 299)


def test_a_special_token_beyond_the_vocabulary_that_no_text_can_give_is_allowed(save_tokenizer) -> None:
    folder = save_tokenizer()
    theirs = AutoTokenizer.from_pretrained(folder)
    theirs.add_special_tokens({"additional_special_tokens": ["<image>"]})
    theirs.save_pretrained(folder)
    assert theirs.convert_tokens_to_ids("<image>") == 300
    [ids] = DocumentEncoder.create(folder, "auto", 300).encode(["an <image> here"])
    assert max(ids) < 300


def test_the_key_changes_with_the_tokenizer_and_the_separator_only(save_tokenizer) -> None:
    one = save_tokenizer("one", special=("<|endoftext|>", "<sep>"))
    same = save_tokenizer("same", special=("<|endoftext|>", "<sep>"))
    other = save_tokenizer("other", special=("<|endoftext|>", "<sop>"))
    key = DocumentEncoder.create(one, "auto", 300).spec.key
    assert DocumentEncoder.create(same, "<|endoftext|>", 400).spec.key == key
    assert DocumentEncoder.create(one, "<sep>", 300).spec.key != key
    assert DocumentEncoder.create(other, "auto", 300).spec.key != key


def test_a_folder_without_a_tokenizer_is_an_error_of_one_line(tmp_path: Path) -> None:
    for path, error in ((tmp_path, "no tokenizer can be loaded"), (tmp_path / "nothing", "no such folder")):
        with pytest.raises(UserError, match=error) as raised:
            DocumentEncoder.create(str(path), "auto", 300)
        assert "\n" not in str(raised.value)


def test_dtype_is_uint16_where_the_vocabulary_fits() -> None:
    assert dtype_of(65536) == "uint16"
    assert dtype_of(65537) == "int32"
