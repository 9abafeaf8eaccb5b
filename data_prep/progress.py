"""How far a long step has come: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 15.0
T = TypeVar("T")


def progress(items: Iterable[T], total: int, label: str) -> Iterator[T]:
    """Yield `items`, of which there are `total`, and show on stderr how many have passed."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=label, unit=" documents", leave=False)
        return
    last = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(f"{label}: {count:,} of {total:,} documents", file=sys.stderr, flush=True)
