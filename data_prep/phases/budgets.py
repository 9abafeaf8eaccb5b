"""Which slices, and how many documents of each, the budgets of sources, sets and replay take.

Whole documents are taken, in a seeded order of slices, until the next one would pass a budget.
"""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from common.seeded import seeded_order
from data_prep.plan import TOKENIZE, Budget, Plan
from data_prep.shards import Shard
from data_prep.work import Work

Lengths = dict[str, NDArray[np.integer]]  # of each document of a slice: "tokens", "characters"


def seeded_slices(plan: Plan, number: int, source: int | None = None) -> list[int]:
    """The slices of a source, or of a whole set, in the order in which budgets take them."""
    slices = plan.slices_of(number, source)
    order = seeded_order(plan.seed, len(slices), "slices" if source is None else f"slices of source {source}")
    return [slices[position].number for position in order]


def source_budget(plan: Plan, number: int, source: int) -> Budget:
    """The budget of one source of a set; of a set that is its own only source, the set's."""
    one = plan.sets[number]
    return Budget(*one.entry.sources[source].caps) if one.entry.sources else one.budget


def total_of(work: Work, number: int) -> dict[str, int]:
    """What a tokenized slice has for training: "documents", "tokens" and "characters"."""
    train = work.figures(TOKENIZE, number)["train"]
    return {unit: train[unit] for unit in ("documents", "tokens", "characters")}


def taken_of(work: Work, number: int) -> dict[int, int]:
    """How many training documents of each slice of a set the budgets take: the sources' own, then the set's."""
    plan = work.plan
    one = plan.sets[number]

    def lengths(part: int) -> Lengths:
        characters = np.load(work.path(TOKENIZE, part, ".sizes.npy"))[0]
        return {"tokens": Shard(work.path(TOKENIZE, part, ".train")).lengths, "characters": characters}

    by_source: dict[int, int] = {}
    for source in range(len(one.entry.source_list)):
        order = seeded_slices(plan, number, source)
        by_source |= take(order, _Totals(work), source_budget(plan, number, source), lengths)
    if not one.entry.sources or not one.budget.limits:
        return by_source
    totals = {part: _of_first(total_of(work, part), lengths, part, count) for part, count in by_source.items()}

    def first(part: int) -> Lengths:
        return {unit: values[: by_source[part]] for unit, values in lengths(part).items()}

    return take([part for part in seeded_slices(plan, number) if part in by_source], totals, one.budget, first)


class _Totals(dict[int, dict[str, int]]):
    """Totals of tokenized slices, read when they are asked for: those past a budget may not be there."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work

    def __missing__(self, number: int) -> dict[str, int]:
        self[number] = total_of(self._work, number)
        return self[number]


def _of_first(total: dict[str, int], lengths: Callable[[int], Lengths], number: int, count: int) -> dict[str, int]:
    if count == total["documents"]:
        return total
    return {"documents": count, **{unit: int(values[:count].sum()) for unit, values in lengths(number).items()}}


def take(
    order: Iterable[int], totals: Mapping[int, dict[str, int]], budget: Budget, lengths: Callable[[int], Lengths]
) -> dict[int, int]:
    """How many of its first documents each slice gives: {slice: documents}, slices past the budget left out.

    Args:
        order: the slices in the order in which they are taken.
        totals: each slice's "documents", "tokens" and "characters".
        budget: the most that is taken of each.
        lengths: gives each document's "tokens" and "characters"; called for the one slice that gives a part.
    """
    left = budget.limits
    taken: dict[int, int] = {}
    for number in order:
        if all(totals[number][unit] <= limit for unit, limit in left.items()):
            count = totals[number]["documents"]
        else:
            count = _fitting(lengths(number), left)
        if count or not totals[number]["documents"]:
            taken[number] = count
        if count < totals[number]["documents"]:
            break
        left = {unit: limit - totals[number][unit] for unit, limit in left.items()}
    return taken


def is_reached(order: Iterable[int], totals: Mapping[int, dict[str, int]], budget: Budget) -> bool:
    """Whether the slices that are done already, from the first on without a gap, reach the budget."""
    left = budget.limits
    if not left:
        return False
    for number in order:
        if number not in totals:
            return False
        left = {unit: limit - totals[number][unit] for unit, limit in left.items()}
        if any(limit < 0 for limit in left.values()):
            return True
    return False


def _fitting(lengths: Lengths, left: dict[str, int]) -> int:
    count = len(lengths["tokens"])
    for unit, limit in left.items():
        if unit == "documents":
            count = min(count, limit)
        else:
            fits = int(np.searchsorted(np.cumsum(lengths[unit], dtype=np.int64), limit, side="right"))
            count = min(count, fits)
    return count
