"""The definition of a BPE tokenizer (tokenizer.json): how it splits words, and how it is extended."""

import copy
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import Tokenizer

from common.errors import UserError
from data_prep.extend.merges import Word
from data_prep.extension import merges_of

SPACE = "\u2581"  # SentencePiece's: it begins a word
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_WORDS = re.compile(f"{SPACE}+(?={SPACE})|{SPACE}?[^{SPACE}]+|{SPACE}+")


class BpeDefinition:
    """A tokenizer.json whose model is a BPE.

    Args:
        definition: its JSON.
        name: where it is from, for messages.

    Raises:
        UserError: it is of another kind, or a BPE whose tokens are not simply joined.
    """

    def __init__(self, definition: dict[str, Any], name: str) -> None:
        model = definition["model"]
        if model["type"] != "BPE":
            raise UserError(
                f"extend-tokenizer: {name} is a {model['type']} tokenizer; only BPE ones, which have merges, can be "
                "extended"
            )
        part = next((key for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(key)), None)
        if part is not None:
            raise UserError(
                f"extend-tokenizer: {name} has a {part}, {model[part]!r}; such a BPE can't be extended yet"
            )
        self._definition, self._name = definition, name
        self._tokenizer = Tokenizer.from_str(json.dumps(definition))

    @property
    def text(self) -> str:
        """The JSON."""
        return json.dumps(self._definition, ensure_ascii=False)

    @property
    def vocabulary(self) -> dict[str, int]:
        """All tokens with their ids, added ones too."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    @property
    def never_merged(self) -> list[str]:
        """Added tokens, the one for unknown text, and those that stand for a byte which only the decoder joins."""
        model = self._definition["model"]
        found = [token["content"] for token in self._definition["added_tokens"]]
        found += [model["unk_token"]] if model.get("unk_token") else []
        return [*found, *(token for token in model["vocab"] if model.get("byte_fallback") and _BYTE.fullmatch(token))]

    def words(self, texts: Iterable[str]) -> Counter[str]:
        """The parts of texts within which merges happen, and how often each occurs."""
        normalizer, splitter = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        counts: Counter[str] = Counter()
        for text in texts:
            plain = text if normalizer is None else normalizer.normalize_str(text)
            parts = [plain] if splitter is None else [part for part, _ in splitter.pre_tokenize_str(plain)]
            counts.update(parts if splitter is not None and self._splits_at_spaces else _at_spaces(parts))
        return counts

    @property
    def _splits_at_spaces(self) -> bool:
        """Whether its pre-tokenizer cuts a text into words; SentencePiece's may leave it whole."""
        return len(self._tokenizer.pre_tokenizer.pre_tokenize_str("a b")) > 1

    def split(self, words: Counter[str], of_old: Counter[str]) -> list[Word]:
        """Words as the tokenizer splits them, with their counts in text of new and of old languages."""
        tokenize = self._tokenizer.model.tokenize
        every = sorted(words.keys() | of_old.keys())
        return [Word(tuple(t.value for t in tokenize(word)), words[word], of_old[word]) for word in every]

    def missing_characters(self, words: Counter[str]) -> Counter[str]:
        """Characters that have no token, which fall to bytes, and how often they occur; none of a byte-level BPE."""
        if not self._definition["model"].get("byte_fallback"):
            return Counter()
        counts: Counter[str] = Counter()
        for word, count in words.items():
            for character in word:
                counts[character] += count
        vocabulary = self._definition["model"]["vocab"]
        return Counter({character: count for character, count in counts.items() if character not in vocabulary})

    def extended(self, characters: list[str], merges: list[tuple[str, str]]) -> "BpeDefinition":
        """The same with more tokens, first characters, then what merges make; ids go on after all old ones.

        Added tokens become part of the BPE's vocabulary too: else they would get other ids when it is loaded.
        """
        definition = copy.deepcopy(self._definition)
        model, number = definition["model"], max(self.vocabulary.values()) + 1
        for token in definition["added_tokens"]:
            model["vocab"].setdefault(token["content"], token["id"])
        for token in [*characters, *(left + right for left, right in merges)]:
            model["vocab"][token] = number
            number += 1
        as_text = any(isinstance(merge, str) for merge in model["merges"][:1])
        model["merges"] += [" ".join(merge) if as_text else list(merge) for merge in merges]
        return BpeDefinition(definition, self._name)

    @property
    def num_merges(self) -> int:
        """How many it has."""
        return len(merges_of(self._definition))


def _at_spaces(parts: Iterable[str]) -> Iterator[str]:
    for part in parts:
        yield from _WORDS.findall(part)
