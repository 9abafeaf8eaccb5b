"""`python -m data_prep extend-tokenizer`, and what a run takes for an extended tokenizer.

Run: pytest tests/data_prep/test_extend_tokenizer.py
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mistral_common
import pytest
import yaml
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaTokenizerFast, PreTrainedTokenizerFast

from common.errors import UserError, exit_on_user_error
from common.settings import parse_settings
from data_prep.__main__ import main
from data_prep.config import PreparationConfig
from data_prep.encoders import make_encoders
from data_prep.extend.merges import MergeLearner, Word
from data_prep.extension import NewTokens, find_new_tokens
from data_prep.prepare import plan_preparation, prepare
from data_prep.sample import sample_documents
from tests.data_prep.conftest import pages

ADD = 30
MISTRAL = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
SENTENCES = [
    "The house by the river is made of stone.", "  two spaces, a\ttab and\nnew lines\n\n", "def f(x): return x ** 2",
    "a text that spells <|endoftext|> and <s>", "日本語 emoji 🦊", "Το σπίτι στο ποτάμι είναι από πέτρα.",
]  # fmt: skip


def byte_level(folder: Path, save_tokenizer: Any) -> None:
    """The tests' byte-level BPE, as a model with a chat template."""
    made = AutoTokenizer.from_pretrained(save_tokenizer("plain", eos="<|endoftext|>"))
    made.chat_template = "{{ messages[0]['content'] }}"
    made.save_pretrained(folder)


def sentencepiece(folder: Path, _save_tokenizer: Any) -> None:
    """Mistral's real tokenizer as a tokenizer.json: a BPE of characters, others fall to bytes."""
    (folder / "tokenizer.model").write_bytes(MISTRAL.read_bytes())
    backend = LlamaTokenizerFast.from_pretrained(folder).backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    (folder / "tokenizer.model").unlink()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


KINDS: dict[str, Callable[[Path, Any], None]] = {"byte-level": byte_level, "sentencepiece": sentencepiece}


def settings(folder: Path, write_rows: Any, vocab_size: int, **changes: Any) -> dict[str, Any]:
    """A run's settings with a model of that vocabulary, whose tokenizer is to be saved to ``model``."""
    LlamaConfig(vocab_size=vocab_size).save_pretrained(folder / "model")
    return {
        "model": {"path": str(folder / "model")},
        "cache_dir": str(folder / "cache"),
        "data": {
            "held_out": {"by": "page", "fraction": 0.1},
            "replay": None,
            "old": {"en": {"path": str(write_rows("en.jsonl", pages("en", 60)))}},
            "new": {"el": {"path": str(write_rows("el.jsonl", pages("el", 60)))}},
        },
    } | changes


def run_command(folder: Path, tree: dict[str, Any], *arguments: str) -> int:
    """The command line on these settings; its exit code."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["data_prep", "extend-tokenizer", str(path), *arguments])
        return exit_on_user_error(main)


def preparation(tree: dict[str, Any], **model: Any) -> PreparationConfig:
    return parse_settings(PreparationConfig, {**tree, "model": tree["model"] | model}, "x")


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tree(kind: str, tmp_path: Path, save_tokenizer: Any, write_rows: Any) -> dict[str, Any]:
    (tmp_path / "model").mkdir()
    KINDS[kind](tmp_path / "model", save_tokenizer)
    own = AutoTokenizer.from_pretrained(tmp_path / "model")
    return settings(tmp_path, write_rows, max(own.get_vocab().values()) + 1)


def test_old_ids_and_text_of_old_languages_stay_and_new_text_takes_fewer_tokens(
    kind: str, tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "run-tokenizer"
    assert run_command(tmp_path, tree, "--add", str(ADD)) == 0
    printed = capsys.readouterr().out
    own, extended = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "model", target))
    old, vocabulary = own.get_vocab(), extended.get_vocab()
    assert {token: vocabulary[token] for token in old} == old
    added = sorted(vocabulary[token] for token in vocabulary.keys() - old.keys())
    assert added == list(range(len(old), len(old) + ADD))
    assert extended.special_tokens_map == own.special_tokens_map
    assert extended.chat_template == own.chat_template
    assert (extended.chat_template is not None) == (kind == "byte-level")

    encoders = make_encoders(preparation(tree, tokenizer=str(target)))
    assert encoders.own is not None and encoders.new_tokens is not None
    texts = {name: [row["text"] for row in pages(name, 60)] for name in ("en", "el")}
    before = {name: [ids.tolist() for ids in encoders.own.encode(found)] for name, found in texts.items()}
    after = {name: [ids.tolist() for ids in encoders.encoder.encode(found)] for name, found in texts.items()}
    assert after["en"] == before["en"]
    assert all(len(now) < 0.8 * len(then) for now, then in zip(after["el"], before["el"], strict=True))
    if kind == "byte-level":  # old merges come first, so that splitting new tokens again gives what was there before
        assert [pieces_of(ids, encoders.new_tokens) for ids in after["el"]] == before["el"]
    for text in SENTENCES:
        ids = encoders.encoder.encode([text])[0].tolist()[encoders.encoder.spec.num_added - 1 : -1]
        plain = own.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert extended.decode(ids) == own.decode(plain)
    assert f"ids {len(old):,} to {len(old) + ADD - 1:,}" in printed
    english = next(line.split() for line in printed.splitlines() if line.startswith("OLD"))
    assert english[2] == english[4] and english[-1] == "0.0%"


def pieces_of(ids: list[int], new_tokens: NewTokens) -> list[int]:
    """Ids with each new token replaced by its pieces."""
    first = new_tokens.first
    return [piece for one in ids for piece in (new_tokens.pieces[one - first] if one >= first else [one])]


@pytest.mark.parametrize("kind", ["byte-level", pytest.param("sentencepiece", marks=pytest.mark.slow)], indirect=True)
def test_it_writes_the_same_bytes_each_time(tree: dict[str, Any], tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert run_command(tmp_path, tree, "--add", str(ADD), "--to", str(tmp_path / name)) == 0
    one, two = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("kind", ["byte-level", pytest.param("sentencepiece", marks=pytest.mark.slow)], indirect=True)
def test_it_learns_from_no_held_out_text(tree: dict[str, Any], tmp_path: Path, write_rows: Any) -> None:
    planned = plan_preparation(preparation(tree))
    kept = {document.text for document in sample_documents(planned, "el", 10**9)}
    rows = pages("el", 60)
    held_out = [row for row in rows if row["text"] not in kept]
    assert 1 < len(held_out) < 20
    for row in held_out:
        row["text"] = "ωφωφω " * 100
    tree["data"]["new"]["el"]["path"] = str(write_rows("el.jsonl", rows))
    assert run_command(tmp_path, tree, "--add", str(ADD), "--to", str(tmp_path / "out")) == 0
    extended = AutoTokenizer.from_pretrained(tmp_path / "out")
    old = AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab()
    added = [extended.decode([number]) for token, number in extended.get_vocab().items() if token not in old]
    assert len(added) == ADD
    assert any("σπ" in token for token in added)
    assert not any("φω" in token or "ωφ" in token for token in added)


def test_a_set_has_its_figures_by_both_tokenizers_and_held_out_text_by_both(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    assert run_command(tmp_path, tree, "--add", str(ADD), "--to", str(tmp_path / "out")) == 0
    plain, extended = prepare(preparation(tree)), prepare(preparation(tree, tokenizer=str(tmp_path / "out")))
    assert plain is not None and extended is not None
    assert plain.own_tokenizer_key is None
    assert extended.own_tokenizer_key == plain.tokenizer_key != extended.tokenizer_key
    for name in ("en", "el"):
        before, after = (store.statistics.sets[name].train for store in (plain, extended))
        assert before is not None and after is not None
        assert before.fertility_before is None
        assert after.fertility_before == pytest.approx(before.fertility, rel=1e-3)
        assert after.characters_per_token_before == pytest.approx(before.characters_per_token, rel=1e-3)
        assert (after.fertility < after.fertility_before) == (name == "el")
        mine, own = plain.held_out(name), extended.held_out(name, by_own_tokenizer=True)
        assert own.num_documents == mine.num_documents == extended.held_out(name).num_documents
        for index in range(mine.num_documents):
            assert own.document(index).tolist() == mine.document(index).tolist()
    assert plain.held_out("el", by_own_tokenizer=True).num_tokens == plain.held_out("el").num_tokens
    extended.verify()
    page = max(extended.folder.glob("*.html"), key=lambda path: path.stat().st_mtime).read_text(encoding="utf-8")
    figures = extended.statistics.sets["el"].train
    assert figures is not None
    assert f"{figures.fertility_before:.2f} → {figures.fertility:.2f}" in page


def test_pairs_of_old_text_and_tokens_that_are_there_are_not_merged() -> None:
    words = [
        Word(("a", "b"), new=50, old=100), Word(("c", "d"), new=40, old=0), Word(("e", "f", "g"), new=30, old=0),
        Word(("x", "y"), new=1, old=0), Word(("e", "f", "h"), new=20, old=0), Word(("<1>", "i"), new=99, old=0),
    ]  # fmt: skip
    learner = MergeLearner(words, ["cd", *"abcdefghixy", "<1>"], ["<1>"])
    # "ab" is frequent in old text, "cd" is there, "xy" occurs once, and "<1>" is never merged.
    assert learner.learn(10, lambda _: None) == [("e", "f"), ("ef", "g"), ("ef", "h")]


def other_kind(folder: Path) -> None:
    """A Unigram in the place of the model's tokenizer."""
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("</s>", -2.0)], 0))
    PreTrainedTokenizerFast(tokenizer_object=unigram, eos_token="</s>").save_pretrained(folder / "model")


def with_suffix(folder: Path) -> None:
    """A BPE that marks the ends of words."""
    bpe = Tokenizer(models.BPE(vocab={"a</w>": 0, "</s>": 1}, merges=[], end_of_word_suffix="</w>"))
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>").save_pretrained(folder / "model")


ADD_9 = ["--add", "9"]
MISTAKES: list[tuple[str, Callable[[Path], Any], dict[str, Any], list[str], list[str]]] = [
    ("nothing to add", lambda _: None, {}, ["--add", "0"], ["--add 0", "at least 1"]),
    ("nothing to read", lambda _: None, {}, [*ADD_9, "--tokens", "0"], ["--tokens 0", "at least 1"]),
    ("a folder that is there", lambda f: (f / "run-tokenizer").mkdir(), {}, ADD_9, ["run-tokenizer", "there", "--to"]),
    ("more than the text gives", lambda _: None, {}, ["--add", "99999"], ["--add 99999", "gives only", "at most"]),
    ("a tokenizer of another kind", other_kind, {}, ADD_9, ["is a Unigram tokenizer", "only BPE"]),
    ("a BPE of suffixes", with_suffix, {}, ADD_9, ["end_of_word_suffix", "</w>"]),
    ("another tokenizer", lambda _: None, {"tokenizer": "elsewhere"}, ADD_9, ["data.tokenizer", "leave it out"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "data", "arguments", "says"), [row[1:] for row in MISTAKES], ids=[row[0] for row in MISTAKES]
)
def test_a_mistake_is_one_line_and_exit_code_2(
    change: Callable[[Path], Any], data: dict[str, Any], arguments: list[str], says: list[str],
    tmp_path: Path, save_tokenizer: Any, write_rows: Any, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "model").mkdir()
    byte_level(tmp_path / "model", save_tokenizer)
    tree = settings(tmp_path, write_rows, 300)
    tree["data"] |= data
    change(tmp_path)
    capsys.readouterr()
    assert run_command(tmp_path, tree, *arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    for words in says:
        assert words in line, line
    assert not list(tmp_path.glob("*.partial")) and not list((tmp_path / "run-tokenizer").glob("*"))


def saved(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> str:
    """A copy of the model's tokenizer whose definition is changed; its folder."""
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / name)
    path = folder / name / "tokenizer.json"
    definition = json.loads(path.read_text(encoding="utf-8"))
    change(definition)
    path.write_text(json.dumps(definition), encoding="utf-8")
    return str(folder / name)


def swap(definition: dict[str, Any]) -> None:
    """Two tokens change places."""
    vocabulary = definition["model"]["vocab"]
    one, two = [token for token, number in vocabulary.items() if number in (20, 21)]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]


def split_otherwise(definition: dict[str, Any]) -> None:
    definition["pre_tokenizer"] = json.loads(pre_tokenizers.ByteLevel(add_prefix_space=True).__getstate__())


def add_tokens(*tokens: tuple[str, int]) -> Callable[[dict[str, Any]], None]:
    return lambda definition: definition["model"]["vocab"].update(dict(tokens))


def without_the_last(definition: dict[str, Any]) -> None:
    definition["model"]["merges"].pop()
    definition["model"]["vocab"].popitem()


NOT_EXTENSIONS: list[tuple[str, Callable[[dict[str, Any]], Any], list[str]]] = [
    ("old ids in another order", swap, ["the id 20, this one has it with the id 21", "old tokens keep their ids"]),
    ("an old token that is gone", without_the_last, ["no such token"]),
    ("text split otherwise", split_otherwise, ["its pre_tokenizer is not that", "split otherwise"]),
    ("merges in another order", lambda d: d["model"]["merges"].reverse(), ["merges", "not all there in their order"]),
    ("a gap in new ids", add_tokens(("qq", 300), ("qqq", 302)), ["no token has the id 301", "from 300 on"]),
]  # fmt: skip
NAMES = [row[0] for row in NOT_EXTENSIONS]


@pytest.mark.parametrize(("change", "says"), [row[1:] for row in NOT_EXTENSIONS], ids=NAMES)
def test_what_does_not_extend_the_models_tokenizer_is_named_in_one_line(
    change: Callable[[dict[str, Any]], Any], says: list[str], tmp_path: Path, save_tokenizer: Any, write_rows: Any
) -> None:
    (tmp_path / "model").mkdir()
    byte_level(tmp_path / "model", save_tokenizer)
    tree = settings(tmp_path, write_rows, 300)
    folder = saved(tmp_path, "other", change)
    with pytest.raises(UserError) as caught:
        make_encoders(preparation(tree, tokenizer=folder))
    line = str(caught.value)
    assert line.startswith(f"model.tokenizer: {folder}: ") and "\n" not in line
    for words in says:
        assert words in line, line


def test_a_tokenizer_that_adds_nothing_is_the_models_own(tmp_path: Path, save_tokenizer: Any, write_rows: Any) -> None:
    (tmp_path / "model").mkdir()
    byte_level(tmp_path / "model", save_tokenizer)
    tree = settings(tmp_path, write_rows, 320)
    folder = saved(tmp_path, "same", lambda _: None)
    same, own = make_encoders(preparation(tree, tokenizer=folder)), make_encoders(preparation(tree))
    assert same.new_tokens is None and same.own is None
    assert same.encoder.spec == own.encoder.spec


def test_new_tokens_begin_after_the_tokenizers_ids_though_the_model_has_rows_there(
    tmp_path: Path, save_tokenizer: Any
) -> None:
    (tmp_path / "model").mkdir()
    byte_level(tmp_path / "model", save_tokenizer)
    own = AutoTokenizer.from_pretrained(tmp_path / "model")
    extended = AutoTokenizer.from_pretrained(tmp_path / "model")
    extended.add_tokens(["σπίτι", "ποτάμι"])  # whole words, found before any merge
    found = find_new_tokens(own, extended, 310, "x")
    assert found is not None
    assert (found.first, found.count, found.vocabulary(310), found.vocabulary(300)) == (300, 2, 310, 302)
    assert [own.decode(list(pieces)) for pieces in found.pieces] == ["σπίτι", "ποτάμι"]


def test_two_tokenizers_in_one_run_are_refused(tmp_path: Path, write_rows: Any) -> None:
    tree = settings(tmp_path, write_rows, 300)
    tree["data"]["tokenizer"] = "one"
    with pytest.raises(UserError, match=r"model\.tokenizer, .*, and data\.tokenizer, .*, are both given"):
        preparation(tree, tokenizer="two")
    with pytest.raises(UserError, match="is not a folder"):
        make_encoders(preparation({**tree, "data": tree["data"] | {"tokenizer": None}}, tokenizer="none"))
