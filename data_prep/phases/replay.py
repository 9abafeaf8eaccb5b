"""Replay: a budget of an old set, drawn over the whole of its corpus. Each slice gives its share, by characters."""

import math
from collections.abc import Container
from dataclasses import dataclass

import numpy as np

from common.seeded import seeded_hash
from data_prep.dedup.deduplicate import dropped_of
from data_prep.plan import FILTER, HELD_OUT, Json, Slice
from data_prep.work import Work

MOST_CHARACTERS_A_TOKEN = 8  # of a slice's draw: more than any tokenizer reaches on running text
BYTES_A_CHARACTER, ADDED_A_DOCUMENT = 4, 2  # no text has more tokens than that


@dataclass(frozen=True)
class Share:
    """What one slice may give."""

    tokens: float
    characters: float

    def reached(self, tokens: int, characters: int) -> bool:
        """Whether so much is enough."""
        return tokens >= self.tokens or characters >= self.characters


def replayed_sets(work: Work) -> list[int]:
    """The numbers of the sets that are written and have a replay budget."""
    return [number for number, one in enumerate(work.plan.sets) if one.is_written and one.replay is not None]


def measure(work: Work, number: int) -> Json:
    """How many training "documents" and "characters" deduplication left of a slice."""
    left = _left(work, work.plan.slices[number])
    return {"documents": len(left), "characters": sum(left.values())}


def _left(work: Work, part: Slice) -> dict[int, int]:
    """Rows of a slice's training documents that deduplication left, with their characters."""
    rows = np.load(work.path(FILTER, part.number, ".rows.npy"))
    train = (np.load(work.path(FILTER, part.number, ".flags.npy")) & HELD_OUT) == 0
    if work.plan.finds_duplicates:
        train &= ~np.isin(rows, np.array(list(dropped_of(work, part)), rows.dtype))
    characters = np.load(work.path(FILTER, part.number, ".characters.npy"))
    return dict(zip(rows[train].tolist(), characters[train].tolist(), strict=True))


def quotas(work: Work, _task: int) -> Json:
    """What each replayed set's slices have in all, by the set's number: "documents" and "characters"."""
    found: Json = {}
    for number in replayed_sets(work):
        figures = [work.figures("measure", part.number) for part in work.plan.slices_of(number)]
        found[str(number)] = {key: sum(figure[key] for figure in figures) for key in ("documents", "characters")}
    return found


def quota(work: Work, part: Slice) -> Share | None:
    """A slice's share of its set's budget; None where the set has none, or has less text than the budget."""
    budget = work.plan.set_of(part).replay
    if budget is None:
        return None
    whole, mine = work.figures("quotas", 0)[str(part.set)], work.figures("measure", part.number)
    most = whole["characters"] * BYTES_A_CHARACTER + whole["documents"] * ADDED_A_DOCUMENT
    tokens = math.inf if budget.tokens is None or budget.tokens >= most else budget.tokens
    characters = math.inf if budget.characters is None else budget.characters
    if tokens == math.inf and characters >= whole["characters"]:
        return None
    share = mine["characters"] / max(1, whole["characters"])
    return Share(tokens * share, characters * share)


@dataclass(frozen=True)
class Draw:
    """The rows of a slice that can be needed to reach its share, and the random order they are taken in."""

    share: Share
    rows: Container[int]
    places: dict[int, int]


def draw(work: Work, part: Slice, share: Share) -> Draw:
    """Draw a slice's training documents."""
    characters = _left(work, part)
    places = {row: seeded_hash(work.plan.seed, "replay", part.place, row) for row in characters}
    wanted: set[int] = set()
    # What is a copy of a held-out text is seen only when the text is read: twice as much leaves room for that.
    enough = 2 * min(share.characters, share.tokens * MOST_CHARACTERS_A_TOKEN)
    total = 0
    for row in sorted(characters, key=places.__getitem__):
        wanted.add(row)
        total += characters[row]
        if total > enough:
            break
    return Draw(share, wanted, places)
