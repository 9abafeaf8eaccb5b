"""Processes that want the same thing on one disk take turns."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path, waiting: str, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of a file, created if it is missing; a second process waits, and says so with ``waiting``.

    Holders of a ``shared`` lock don't exclude each other.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with open(path, "a") as file:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            print(waiting, flush=True)
            fcntl.flock(file, kind)
        yield
