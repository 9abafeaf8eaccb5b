"""One writer per run, on whichever host it is; the processes that it starts share its lock."""

import os
import sys
import time
from pathlib import Path

from common.errors import BusyError, UserError
from common.locks import SECONDS_BETWEEN_TRIES, Heart, Holder, LockFile

EXIT_LOST_LOCK = 77
TOKEN_VARIABLE = "PIPELINE_RUN_LOCK"  # tells children of a holder that they share its lock


class RunLock:
    """Held while a process, or a child that it has started, writes to a run's folder.

    Args:
        folder: the run's.

    Raises:
        BusyError: another process holds it; says which, where and since when.
        UserError: the folder can't be made.
    """

    def __init__(self, folder: Path) -> None:
        self._lock = LockFile(folder / ".lock", token=os.environ.get(TOKEN_VARIABLE, ""))
        self._inherited: Holder | None = None
        self._heart = Heart(lambda: [self._lock], self._end)

    def __enter__(self) -> "RunLock":
        lock, holder = self._lock, self._lock.holder()
        if TOKEN_VARIABLE in os.environ and holder is not None and holder.get("token") == lock.token:
            self._inherited = holder
            lock.name_this_process()  # so that it counts if a parent dies
        else:
            self._lock = lock = LockFile(lock.path)
            self._take()
        os.environ[TOKEN_VARIABLE] = lock.token
        self._heart.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._heart.__exit__()
        holder = self._lock.holder()
        if holder is None or holder.get("token") != self._lock.token:
            return
        if self._inherited is not None:
            self._lock.replace(self._inherited)
        else:
            del os.environ[TOKEN_VARIABLE]
            self._lock.release()

    def _take(self) -> None:
        folder = self._lock.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: can't be made ({error.strerror}); change output_dir or name") from error
        while (state := self._lock.take()) != "mine":
            holder = self._lock.holder()
            if state == "alive" and holder is not None:
                raise BusyError(
                    f"{self._lock.path.parent}: is in use by process {holder['pid']} on {holder['host']} "
                    f"(since {holder['since']}); wait for it, end it, or give the run another name"
                )
            time.sleep(SECONDS_BETWEEN_TRIES)

    def _end(self, lock: LockFile) -> None:
        holder = lock.holder() or {}
        print(f"error: {lock.path.parent}: another process ({holder.get('pid')} on {holder.get('host')}) has "
              "taken this run over; ending", file=sys.stderr, flush=True)  # fmt: skip
        os._exit(EXIT_LOST_LOCK)
