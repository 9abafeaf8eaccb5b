"""Jobs that share a disk and nothing else, such as SLURM array tasks: each claims a task by creating a file.

A claim only spares work: were two jobs to do one task, both would write the same bytes. A job that is killed leaves
its claims; they are void once the file has not been touched for a while, or when the same job, restarted, meets them.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from data_prep.executor.pool import Phase

HEARTBEAT_SECONDS = 10.0
VOID_SECONDS = 60.0
POLL_SECONDS = 0.5


class Claims:
    """The claims of one job; `owner` names it, the same after a restart.

    A context manager: inside, a thread keeps touching its claims.
    """

    def __init__(self, owner: str, *, void_seconds: float = VOID_SECONDS) -> None:
        self._owner = owner
        self._incarnation = f"{owner} {os.uname().nodename} {os.getpid()}"
        self._void_seconds = void_seconds
        self._held: set[Path] = set()
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Claims":
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._heart.join()
        for path in self._held:
            path.unlink(missing_ok=True)

    def tasks(self, phase: Phase) -> Iterator[int]:
        """Tasks of the phase as this job claims them; ends when all are done, by whichever job."""
        folder = phase.work.folder / "claims" / phase.name
        while True:
            open_tasks = [task for task in phase.tasks if not phase.is_done(task)]
            if not open_tasks or phase.work.is_finished:
                return
            got = False
            for task in open_tasks:
                path = folder / f"{task:06d}"
                if not phase.is_done(task) and self._take(path):
                    got = True
                    yield task
                    self._release_done(phase, folder)
            if not got:
                self._release_done(phase, folder)
                time.sleep(POLL_SECONDS)

    def _release_done(self, phase: Phase, folder: Path) -> None:
        for path in [path for path in self._held if path.parent == folder]:
            if phase.marker(int(path.name)).is_file():
                self._held.discard(path)
                path.unlink(missing_ok=True)

    def _take(self, path: Path) -> bool:
        """Whether the claim is now this job's."""
        if path in self._held:
            return False
        if path.exists() and not self._is_void(path):
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(self._incarnation)
        except FileExistsError:
            return False
        self._held.add(path)
        return True

    def _is_void(self, path: Path) -> bool:
        try:
            holder = path.read_text(encoding="utf-8")
            age = self._now(path.parent) - path.stat().st_mtime
        except OSError:
            return True
        restarted = holder.startswith(f"{self._owner} ") and holder != self._incarnation
        return restarted or age > self._void_seconds

    def _now(self, folder: Path) -> float:
        """The time by the disk's own clock, which may not be this host's."""
        probe = folder / f".clock-{os.uname().nodename}-{os.getpid()}"
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(min(HEARTBEAT_SECONDS, self._void_seconds / 4)):
            for path in list(self._held):
                with suppress(OSError):
                    os.utime(path)
