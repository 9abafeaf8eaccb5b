"""Replay: a budget of an old set, drawn over the whole of its corpus. Each slice gives its share, by characters."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data_prep.config import DataConfig
from data_prep.dedup.deduplicate import dropped_of
from data_prep.phases.filter import HELD_OUT
from data_prep.phases.filter import PHASE as FILTER
from data_prep.plan import Json, Replay, Slice, Work

if TYPE_CHECKING:
    from data_prep.phases.tokenize import Chosen

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


def budgets(data: DataConfig, stage1_tokens: int | None) -> dict[str, Replay]:
    """Each old set's part of `data.replay`, by its weight; a share of stage 1 needs `stage1_tokens`."""
    replay = data.replay
    if replay is None or not data.old or (replay.share is not None and stage1_tokens is None):
        return {}
    tokens = replay.tokens if replay.share is None else math.ceil(replay.share * (stage1_tokens or 0))
    total = sum(entry.weight for entry in data.old.values())

    def part(budget: int | None, weight: float) -> int | None:
        return None if budget is None else max(1, math.floor(budget * weight / total))

    return {
        name: Replay(part(tokens, entry.weight), part(replay.characters, entry.weight))
        for name, entry in data.old.items()
    }


def measure(work: Work, number: int) -> Json:
    """How many training documents and characters deduplication left of a slice."""
    left = _left(work, work.plan.slices[number])
    return {"documents": len(left), "characters": sum(left.values())}


def _left(work: Work, part: Slice) -> dict[int, int]:
    """Rows of a slice's training documents that deduplication left, with their characters."""
    rows = np.load(work.path(FILTER, part.number, ".rows.npy"))
    train = (np.load(work.path(FILTER, part.number, ".flags.npy")) & HELD_OUT) == 0
    if work.plan.data.filters.duplicates:
        train &= ~np.isin(rows, np.array(list(dropped_of(work, part)), rows.dtype))
    characters = np.load(work.path(FILTER, part.number, ".characters.npy"))
    return dict(zip(rows[train].tolist(), characters[train].tolist(), strict=True))


def quotas(work: Work, _task: int) -> Json:
    """What each old set's slices have in all, by name."""
    found: Json = {}
    for name in work.plan.replay:
        figures = [work.figures("measure", part.number) for part in work.plan.slices_of(name)]
        found[name] = {key: sum(figure[key] for figure in figures) for key in ("documents", "characters")}
    return found


def quota(work: Work, part: Slice) -> Share | None:
    """A slice's share of its set's budget; None where the budget is more than the set can have."""
    budget = work.plan.replay[part.name]
    whole, mine = work.figures("quotas", 0)[part.name], work.figures("measure", part.number)
    most = whole["characters"] * BYTES_A_CHARACTER + whole["documents"] * ADDED_A_DOCUMENT
    tokens = math.inf if budget.tokens is None or budget.tokens >= most else budget.tokens
    characters = math.inf if budget.characters is None else budget.characters
    if tokens == math.inf and characters >= whole["characters"]:
        return None
    share = mine["characters"] / max(1, whole["characters"])
    return Share(tokens * share, characters * share)


def drawn(work: Work, part: Slice, chosen: Iterator["Chosen"], share: Share) -> list["Chosen"]:
    """Documents in a random order, as many as can be needed to reach the share; held-out ones first."""
    characters = _left(work, part)
    places = {row: _place(work.plan.seed, part, row) for row in characters}
    wanted: set[int] = set()
    # What is a copy of a held-out text is seen only when the text is read: twice as much leaves room for that.
    enough = 2 * min(share.characters, share.tokens * MOST_CHARACTERS_A_TOKEN)
    total = 0
    for row in sorted(characters, key=places.__getitem__):
        wanted.add(row)
        total += characters[row]
        if total > enough:
            break
    found = [one for one in chosen if one.held_out or one.document.index in wanted]
    return sorted(found, key=lambda one: (not one.held_out, places.get(one.document.index, b"")))


def _place(seed: int, part: Slice, row: int) -> bytes:
    return hashlib.blake2b(f"{seed}\0{part.name}\0{part.number}\0{row}".encode(), digest_size=8).digest()
