"""Text as words and as hashed runs of words: what copies are found by, and fertility is measured on.

A word is what stands between spaces and punctuation, without regard to case; in scripts that put no spaces between
words it is one character. Hashes are the same on every machine and in every process.
"""

import unicodedata

import numpy as np
import xxhash
from numpy.typing import NDArray

WITHOUT_SPACES = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "JAVANESE")
_REMEMBERED = 1 << 19  # words whose hashes are kept: about 60 MB

Hashes = NDArray[np.uint64]


class _Units(dict[int, str]):
    """A table for str.translate that makes units space-separated: no punctuation, spaces around lone characters."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if unicodedata.category(character)[0] in "PSZC":
            unit = " "
        elif unicodedata.name(character, "").startswith(WITHOUT_SPACES):
            unit = f" {character} "
        else:
            unit = character
        self[code] = unit
        return unit


class _WordHashes(dict[str, int]):
    def __missing__(self, word: str) -> int:
        if len(self) >= _REMEMBERED:
            self.clear()
        value = self[word] = xxhash.xxh3_64_intdigest(word.encode())
        return value


_UNITS = _Units()
_HASHES = _WordHashes()


def words_of(text: str) -> list[str]:
    """The words of a text, in order."""
    return text.casefold().translate(_UNITS).split()


def is_without_spaces(word: str) -> bool:
    """Whether a word is a character of a script without spaces."""
    return len(word) == 1 and unicodedata.name(word, "").startswith(WITHOUT_SPACES)


def word_hashes(text: str) -> Hashes:
    """A 64-bit hash of each word, in order: (words,)."""
    words = words_of(text)
    return np.fromiter(map(_HASHES.__getitem__, words), np.uint64, len(words))


def shingles(words: Hashes, width: int) -> Hashes:
    """Sorted distinct hashes of every run of `width` words; a shorter text is one run, an empty one none."""
    if not len(words):
        return words
    width = min(width, len(words))
    count = len(words) - width + 1
    mixed = words[:count].copy()
    for offset in range(1, width):
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9) + words[offset : offset + count]
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0x94D049BB133111EB)
    return np.unique(mixed ^ (mixed >> np.uint64(29)))
