"""Jobs that share a disk and nothing else, such as SLURM array tasks: each claims a task by a lock file.

A claim only spares work: if two jobs did one task, both would write the same bytes. A job that is killed leaves its
claims; others take them over when they see that it is dead, and so does the same job, restarted.
"""

import time
from collections.abc import Iterator
from pathlib import Path

from common.locks import SECONDS_BETWEEN_TRIES, Heart, LockFile
from data_prep.executor.pool import Phase


class Claims:
    """The claims of one job, inside a ``with`` block.

    Args:
        owner: names the job, the same after a restart.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._locks: dict[Path, LockFile] = {}  # every claim that this job has looked at
        self._held: dict[Path, LockFile] = {}
        self._heart = Heart(lambda: list(self._held.values()), lambda lock: self._held.pop(lock.path, None))

    def __enter__(self) -> "Claims":
        self._heart.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._heart.__exit__()
        for lock in self._held.values():
            lock.release()

    def tasks(self, phase: Phase) -> Iterator[int]:
        """Tasks of the phase as this job claims them; ends when all are done, by whichever job."""
        folder = phase.work.folder / "claims" / phase.name
        while True:
            open_tasks = [task for task in phase.tasks if not phase.is_done(task)]
            if not open_tasks or phase.work.is_finished:
                return
            got = False
            for task in open_tasks:
                if not phase.is_done(task) and self._take(folder / f"{task:06d}"):
                    got = True
                    yield task
                    self._release_done(phase, folder)
            if not got:
                self._release_done(phase, folder)
                time.sleep(SECONDS_BETWEEN_TRIES)

    def _take(self, path: Path) -> bool:
        """Whether the claim is now this job's."""
        if path in self._held:
            return False
        lock = self._locks.setdefault(path, LockFile(path, owner=self._owner))
        if lock.take() != "mine":
            return False
        self._held[path] = lock
        return True

    def _release_done(self, phase: Phase, folder: Path) -> None:
        for path in [path for path in self._held if path.parent == folder]:
            if phase.marker(int(path.name)).is_file():
                self._held.pop(path).release()
