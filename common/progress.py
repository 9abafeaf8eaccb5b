"""A progress bar on a terminal, plain lines in a log."""

import sys
import time
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0
SECONDS_WORTH_A_LINE = 1.0  # what is done sooner needs no last line


class _Lines:
    """A progress bar's text, printed as a line every few seconds."""

    def __init__(self, total: int, description: str, unit: str, initial: int = 0) -> None:
        self.total, self.description, self.unit = total, description, unit
        self.initial = self.done = initial
        self.postfix = ""
        self.start = self.last = time.monotonic()

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, amount: int) -> None:
        self.done += amount
        if time.monotonic() - self.last >= SECONDS_BETWEEN_LINES and self.done < self.total:
            self._say()

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        self.postfix = f"  {text}"

    def close(self) -> None:
        if time.monotonic() - self.start >= SECONDS_WORTH_A_LINE:
            self._say()

    def _say(self) -> None:
        self.last = time.monotonic()
        seconds = max(self.last - self.start, 1e-9)
        rate = (self.done - self.initial) / seconds
        left = f"{(self.total - self.done) / rate:.0f}" if rate else "?"
        print(
            f"{self.description}: {self.done:,}/{self.total:,} {self.unit}s, {rate:,.{0 if rate >= 10 else 2}f}/s, "
            f"{seconds:.0f} s, {left} s left{self.postfix}",
            flush=True,
        )


def progress(total: int, description: str, unit: str, *, show: bool = True, initial: int = 0) -> Any:
    """A tqdm bar where stderr is a terminal, else an object like it that prints lines; silent if not ``show``.

    ``initial`` was done before: it counts as done, not in the rate.
    """
    if not show or sys.stderr.isatty():
        return tqdm(
            total=total, desc=description, unit=unit, unit_scale=True, dynamic_ncols=True, disable=not show,
            initial=initial,
        )  # fmt: skip
    return _Lines(total, description, unit, initial)
