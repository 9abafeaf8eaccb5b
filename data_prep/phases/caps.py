"""Budgets: whole documents are taken in a seeded order of slices until the running total would pass a cap."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Lengths = dict[str, NDArray[np.integer]]  # of each document of a slice: "tokens", "characters"
UNITS = ("documents", "tokens", "characters")


@dataclass(frozen=True)
class Cap:
    """The most that is taken of each; None is no limit."""

    documents: int | None = None
    tokens: int | None = None
    characters: int | None = None

    @property
    def limits(self) -> dict[str, int]:
        """Those that are set."""
        return {unit: limit for unit in UNITS if (limit := getattr(self, unit)) is not None}


def take(
    order: Iterable[int], totals: dict[int, dict[str, int]], cap: Cap, lengths: Callable[[int], Lengths]
) -> dict[int, int]:
    """How many of its first documents each slice gives: {slice: documents}, slices past the cap left out.

    Args:
        order: the slices in the order in which they are taken.
        totals: each slice's documents, tokens and characters.
        lengths: gives each document's tokens and characters; called for the one slice that gives a part.
    """
    left = cap.limits
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


def is_reached(order: Iterable[int], totals: dict[int, dict[str, int]], cap: Cap) -> bool:
    """Whether the slices that are done already, from the first on without a gap, reach the cap."""
    left = cap.limits
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
