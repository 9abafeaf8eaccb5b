"""Which documents are held out of training, and which training documents are near-copies of those.

A document is held out by a hash of its page, never by line: a page and its translations fall on the same side, in
every set and every run of the same seed. MinHash (Broder 1997) then finds copies of the held-out text in training.
"""

import hashlib
import unicodedata

from datasketch import MinHash, MinHashLSH

SHINGLE = 3  # units (words, or characters of scripts without spaces) a shingle
NUM_PERMUTATIONS = 128
# Scripts that put no spaces between words: there a unit is a character.
WITHOUT_SPACES = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "JAVANESE")


def is_held_out(key: str, seed: int, fraction: float) -> bool:
    """Whether the documents of this key (a page, or a text) are held out: true for `fraction` of all keys."""
    digest = hashlib.blake2b(f"{seed}\0{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


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


_UNITS = _Units()


def shingles(text: str) -> set[str]:
    """Every run of three units of a text, without regard to case and punctuation; a shorter text is one shingle."""
    units = text.casefold().translate(_UNITS).split()
    if len(units) <= SHINGLE:
        return {" ".join(units)} if units else set()
    return {" ".join(units[i : i + SHINGLE]) for i in range(len(units) - SHINGLE + 1)}


class NearCopies:
    """Finds texts whose estimated Jaccard similarity to one of the added texts is at least `threshold`."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        # Weighted against misses: candidates are checked by the estimate below, so false ones cost only time.
        self._index = MinHashLSH(threshold=threshold, num_perm=NUM_PERMUTATIONS, weights=(0.1, 0.9))
        self._signatures: list[MinHash] = []
        self._known: set[str] = set()

    def add(self, text: str) -> None:
        """Add a held-out text."""
        found = shingles(text)
        if not found:
            return
        self._known |= found
        signature = _signature(found)
        self._index.insert(len(self._signatures), signature)
        self._signatures.append(signature)

    def has_near_copy_of(self, text: str) -> bool:
        """Whether an added text is as similar to this one as the threshold says."""
        found = shingles(text)
        # J(a, b) >= t needs at least t |a| of a's shingles to be in b: most texts are settled without a signature.
        if not found or sum(map(self._known.__contains__, found)) < self._threshold * len(found):
            return False
        signature = _signature(found)
        candidates = self._index.query(signature)
        return any(signature.jaccard(self._signatures[i]) >= self._threshold for i in candidates)


def _signature(found: set[str]) -> MinHash:
    signature = MinHash(num_perm=NUM_PERMUTATIONS)
    signature.update_batch([shingle.encode() for shingle in found])
    return signature
