"""Figures of a set, merged from those of its slices, and the warning that they may call for."""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict

from data_prep.dedup.word_shingles import is_without_spaces, words_of
from data_prep.tokenizer import DocumentEncoder

SAMPLE_CHARACTERS = 200_000  # of each slice, whose words are counted: enough for a mean, little time
# Tokens per word above which a tokenizer hardly knows a language: languages it was trained on have 1.2 to 2.5. Scripts
# without spaces count each character as a word; there a known language has about 0.7, one that falls to bytes 2 to 3.
MOST_FERTILITY = 4.0
MOST_FERTILITY_WITHOUT_SPACES = 1.6


@dataclass
class Tally:
    """Figures of documents as they are written. The sample is the first SAMPLE_CHARACTERS of a slice."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    characters: int = 0
    added: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    sample: Counter[str] = field(default_factory=Counter)

    def add(self, text: str, tokens: int, num_added: int, own: DocumentEncoder | None = None) -> None:
        """Count a document of so many ids, `num_added` of which are not its text's.

        With the model's own tokenizer, where the run's extends it, the sample is counted in its tokens too.
        """
        self.documents += 1
        self.tokens += tokens
        self.bytes += len(text) if text.isascii() else len(text.encode())
        self.characters += len(text)
        self.added += num_added
        self.lengths[tokens.bit_length()] += 1
        if self.sample["characters"] < SAMPLE_CHARACTERS:
            words = words_of(text[:SAMPLE_CHARACTERS])
            share = min(1.0, SAMPLE_CHARACTERS / max(1, len(text)))
            self.sample["characters"] += min(len(text), SAMPLE_CHARACTERS)
            self.sample["tokens"] += round((tokens - num_added) * share)
            self.sample["words"] += len(words)
            if own is not None:
                ids = own.encode([text[:SAMPLE_CHARACTERS]])[0]
                self.sample["tokens_before"] += ids.size - own.spec.num_added
            self.sample["words_without_spaces"] += sum(map(is_without_spaces, words))

    def as_json(self) -> dict[str, Any]:
        """All of it, by the names of the fields; "lengths" by the bits of a document's number of tokens."""
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "characters": self.characters,
            "added": self.added,
            "lengths": {str(bits): self.lengths[bits] for bits in sorted(self.lengths)},
            "sample": dict(sorted(self.sample.items())),
        }

    def merge(self, value: dict[str, Any]) -> None:
        """Add what another tally wrote."""
        for key in ("documents", "tokens", "bytes", "characters", "added"):
            setattr(self, key, getattr(self, key) + value[key])
        self.lengths.update({int(bits): count for bits, count in value["lengths"].items()})
        self.sample.update(value["sample"])


class LengthBin(BaseModel):
    """How many documents have `least` to `most` tokens."""

    model_config = ConfigDict(frozen=True)

    least: int
    most: int
    documents: int


class PartStatistics(BaseModel):
    """One part of a set. Tokens per character, word and byte are of its text, without BOS and separators.

    `fertility` is tokens per word, over a sample of each slice; `warning` says where it is too high. Those that end in
    `_before` are of the sample by the model's own tokenizer, where the run's extends it.
    """

    model_config = ConfigDict(frozen=True)

    documents: int
    characters: int
    bytes: int
    tokens: int
    characters_per_token: float | None
    bytes_per_token: float | None
    fertility: float | None
    words_without_spaces: float | None
    lengths: list[LengthBin]
    fertility_before: float | None = None
    characters_per_token_before: float | None = None


def part_statistics(tally: Tally) -> PartStatistics:
    """The figures of a tally."""
    text_tokens = tally.tokens - tally.added
    words = tally.sample["words"]
    bins = []
    if tally.lengths:
        for bits in range(min(tally.lengths), max(tally.lengths) + 1):
            least = 0 if bits == 0 else 1 << (bits - 1)
            bins.append(LengthBin(least=least, most=(1 << bits) - 1, documents=tally.lengths[bits]))
    return PartStatistics(
        documents=tally.documents,
        characters=tally.characters,
        bytes=tally.bytes,
        tokens=tally.tokens,
        characters_per_token=_ratio(tally.characters, text_tokens),
        bytes_per_token=_ratio(tally.bytes, text_tokens),
        fertility=_ratio(tally.sample["tokens"], words),
        words_without_spaces=_ratio(tally.sample["words_without_spaces"], words),
        lengths=bins,
        fertility_before=_ratio(tally.sample["tokens_before"], words) if tally.sample["tokens_before"] else None,
        characters_per_token_before=_ratio(tally.sample["characters"], tally.sample["tokens_before"]),
    )


def fertility_warning(name: str, language: str, part: PartStatistics) -> str | None:
    """A sentence that says so where the tokenizer hardly knows the language, else None."""
    if part.fertility is None or part.words_without_spaces is None:
        return None
    # A mixture of scripts is judged in between.
    without = part.words_without_spaces
    limit = math.exp((1 - without) * math.log(MOST_FERTILITY) + without * math.log(MOST_FERTILITY_WITHOUT_SPACES))
    if part.fertility <= limit:
        return None
    unit, usual = ("character", "0.7") if without > 0.5 else ("word", "1.2 to 2.5")
    return (
        f"set {name}: the tokenizer hardly knows {language}: {part.fertility:.1f} tokens per {unit} (a language "
        f"it knows has {usual}), {part.characters_per_token:.2f} characters per token: "
        "sequences hold little text, and training and generation cost more; consider a tokenizer that knows it"
        f"{'' if part.fertility_before is not None else ': python -m data_prep extend-tokenizer makes one'}"
    )


def _ratio(a: float, b: float) -> float | None:
    return round(a / b, 4) if b else None
