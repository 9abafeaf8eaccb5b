"""Which slices, and how many documents of each, the budgets of sources, sets and replay take."""

from typing import Any

import numpy as np

from data_prep.config import CapsConfig
from data_prep.phases.caps import Cap, Lengths, take
from data_prep.plan import Plan, Work, seeded
from data_prep.shards import Shard

TOKENIZE = "tokenize"  # the phase whose shards are taken


def seeded_slices(plan: Plan, name: str, source: int | None = None) -> list[int]:
    """A source's slices, or a whole set's, in the order in which budgets take them."""
    numbers = [part.number for part in plan.slices_of(name, source)]
    return seeded(plan.seed, f"{name}/{'' if source is None else source}", numbers)


def source_cap(plan: Plan, name: str, source: int) -> Cap:
    """The cap of one source; of a set that is its own only source, the set's."""
    entry = plan.data.sets[name]
    return _cap(entry.source_list[source]) if entry.sources else _set_cap(plan, name)


def total_of(work: Work, number: int) -> dict[str, int]:
    """Documents, tokens and characters that a tokenized slice has for training."""
    train = work.figures(TOKENIZE, number)["train"]
    return {unit: train[unit] for unit in ("documents", "tokens", "characters")}


def _cap(caps: CapsConfig) -> Cap:
    return Cap(*caps.caps)


def _set_cap(plan: Plan, name: str) -> Cap:
    own, replay = _cap(plan.data.sets[name]), plan.replay.get(name)
    if replay is None:
        return own

    def least(a: int | None, b: int | None) -> int | None:
        return min((value for value in (a, b) if value is not None), default=None)

    return Cap(own.documents, least(own.tokens, replay.tokens), least(own.characters, replay.characters))


def taken_of(work: Work, name: str) -> dict[int, int]:
    """How many training documents of each slice the budgets take: the sources' own, then the set's."""
    plan = work.plan

    def lengths(number: int) -> Lengths:
        characters = np.load(work.path(TOKENIZE, number, ".sizes.npy"))[0]
        return {"tokens": Shard(work.path(TOKENIZE, number, ".train")).lengths, "characters": characters}

    by_source: dict[int, int] = {}
    for source in range(len(plan.data.sets[name].source_list)):
        order = seeded_slices(plan, name, source)
        by_source |= take(order, _Totals(work), source_cap(plan, name, source), lengths)
    cap = _set_cap(plan, name)
    if not plan.data.sets[name].sources or not cap.limits:
        return by_source
    totals = {number: _of_first(total_of(work, number), lengths, number, count) for number, count in by_source.items()}

    def first(number: int) -> Lengths:
        return {unit: values[: by_source[number]] for unit, values in lengths(number).items()}

    return take([n for n in seeded_slices(plan, name) if n in by_source], totals, cap, first)


class _Totals(dict[int, dict[str, int]]):
    """Totals of tokenized slices, read when they are asked for: those past a budget may not be there."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work

    def __missing__(self, number: int) -> dict[str, int]:
        self[number] = total_of(self._work, number)
        return self[number]


def _of_first(total: dict[str, int], lengths: Any, number: int, count: int) -> dict[str, int]:
    if count == total["documents"]:
        return total
    return {"documents": count, **{unit: int(values[:count].sum()) for unit, values in lengths(number).items()}}
