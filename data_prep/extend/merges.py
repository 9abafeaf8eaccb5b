"""More merges for a BPE tokenizer: its training goes on, on text of new languages.

The words of the text are split as the tokenizer splits them now, and the most frequent pair of neighbours becomes the
next merge, as in any BPE training. So each new token is reached by its merges, which a separately trained vocabulary
does not promise. All old merges come first, and a pair is merged only where it makes a token that is not there yet:
a word in which no new pair occurs is split as before.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

LEAST = 2  # occurrences of a pair
# A pair that is this often as frequent in text of old languages as in that of new ones is not merged: its token would
# stand in old text, whose rows stage 1 does not teach.
MOST_IN_OLD = 0.02

Pair = tuple[int, int]


class Word(NamedTuple):
    """A word: the tokens that it is split into, and how often it occurs in text of new and of old languages."""

    tokens: tuple[str, ...]
    new: int
    old: int


class MergeLearner:
    """Counts of pairs of neighbours, kept up to date while pairs are merged.

    Args:
        words: each once.
        vocabulary: all tokens that are there.
        never: tokens that are not merged, such as those of single bytes which only a decoder joins.
    """

    def __init__(self, words: Sequence[Word], vocabulary: Collection[str], never: Collection[str]) -> None:
        self._names: list[str] = []
        self._ids: dict[str, int] = {}
        self._known, self._never = set(vocabulary), {self._id(token) for token in never}
        self._words = [[self._id(token) for token in word.tokens] for word in words]
        self._counts = [(word.new, word.old) for word in words]
        self._totals = sum(word.new for word in words), sum(word.old for word in words)
        self._new: Counter[Pair] = Counter()
        self._old: Counter[Pair] = Counter()
        self._where: defaultdict[Pair, set[int]] = defaultdict(set)
        for number in range(len(self._words)):
            self._count(number, 1)
        self._heap = [self._entry(pair) for pair, count in self._new.items() if count >= LEAST]
        heapq.heapify(self._heap)

    def learn(self, number: int, advance: Callable[[int], object]) -> list[tuple[str, str]]:
        """The next merges, at most ``number``; fewer where no pair is left that occurs often enough.

        Args:
            number: how many.
            advance: is called after each, with 1.
        """
        found: list[tuple[str, str]] = []
        while self._heap and len(found) < number:
            entry = heapq.heappop(self._heap)
            pair = entry[3], entry[4]
            if -entry[0] != self._new[pair]:  # its count has changed since; that of a larger one was pushed
                if self._new[pair] >= LEAST:
                    heapq.heappush(self._heap, self._entry(pair))
                continue
            left, right = self._names[pair[0]], self._names[pair[1]]
            if left + right in self._known or self._never.intersection(pair) or self._is_of_old_text(pair):
                continue
            self._merge(pair, self._id(left + right))
            self._known.add(left + right)
            found.append((left, right))
            advance(1)
        return found

    def _is_of_old_text(self, pair: Pair) -> bool:
        new, old = self._totals
        return self._old[pair] * new > MOST_IN_OLD * self._new[pair] * old

    def _id(self, token: str) -> int:
        number = self._ids.setdefault(token, len(self._names))
        if number == len(self._names):
            self._names.append(token)
        return number

    def _entry(self, pair: Pair) -> tuple[int, str, str, int, int]:
        """Of the heap: the most frequent first, of equally frequent ones the first by name."""
        return -self._new[pair], self._names[pair[0]], self._names[pair[1]], *pair

    def _count(self, number: int, sign: int) -> set[Pair]:
        """Add a word's pairs to the counts, or take them off; returns them."""
        word, (new, old) = self._words[number], self._counts[number]
        pairs = list(zip(word, word[1:], strict=False))
        for pair in pairs:
            self._new[pair] += sign * new
            self._old[pair] += sign * old
        found = set(pairs)
        for pair in found:
            if sign > 0:
                self._where[pair].add(number)
            else:
                self._where[pair].discard(number)
        return found

    def _merge(self, pair: Pair, merged: int) -> None:
        changed: set[Pair] = set()
        for number in list(self._where[pair]):
            self._count(number, -1)
            self._words[number] = _replaced(self._words[number], pair, merged)
            changed |= self._count(number, 1)
        del self._where[pair]
        for one in changed:
            if merged in one and self._new[one] >= LEAST:
                heapq.heappush(self._heap, self._entry(one))


def _replaced(word: list[int], pair: Pair, merged: int) -> list[int]:
    """A word with each occurrence of a pair, from the left, replaced by what it is merged to."""
    result: list[int] = []
    position = 0
    while position < len(word):
        if position + 1 < len(word) and (word[position], word[position + 1]) == pair:
            result.append(merged)
            position += 2
        else:
            result.append(word[position])
            position += 1
    return result
