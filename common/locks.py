"""Lock files: each has one holder, on any disk, and does not outlive it.

A lock file names its holder: host, process-id namespace, pid and the process's start. On the same host a dead holder
is seen at once. From another host it is seen by its heartbeat: the holder rewrites a counter every few seconds, and
one that stays the same through several beats is dead. No clock is compared with another's, and no flock is needed,
which not every shared disk has.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import psutil

SECONDS_BETWEEN_BEATS = 5.0
BEATS_TO_WAIT = 4
SECONDS_BETWEEN_TRIES = 0.5
SECONDS_OF_A_TURN = 0.02

Holder = dict[str, Any]
State = Literal["mine", "alive", "unknown"]


class LockFile:
    """One lock file, as one process sees it.

    Args:
        path: of the file.
        token: names the holder; a new one unless given. Processes with the same token hold the lock together.
        owner: names the holder across restarts: what it held before it was restarted is not held any more.
    """

    def __init__(self, path: Path, token: str = "", owner: str = "") -> None:
        self.path, self.token, self.owner = path, token or uuid.uuid4().hex, owner
        self._since, self._beats = time.strftime("%Y-%m-%d %H:%M:%S"), 0
        self._watched: Holder | None = None
        self._watched_since = 0.0
        self._turn, self._turn_since = 0, 0.0

    def take(self) -> State:
        """Take it if nobody holds it, or its holder is dead.

        Returns:
            ``mine``; or ``alive`` where its holder is; or ``unknown`` where a holder on another host has not been
            watched for long enough: ask again.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            mine = self.path.with_name(f".{self.path.name}.{self.token}")
            mine.write_text(json.dumps(self._me()), encoding="utf-8")
            try:
                if _create(mine, self.path):
                    return "mine"
            finally:
                mine.unlink(missing_ok=True)
            holder = self.holder()
            state = "dead" if holder is None else self._state_of(holder)
            if state != "dead":
                return state
            self._remove(holder)

    def holder(self) -> Holder | None:
        """What the file says; None where it is missing or damaged."""
        return _parse(self.path)

    def name_this_process(self) -> None:
        """Have the file name this process as the holder."""
        self.replace(self._me())

    def replace(self, holder: Holder) -> None:
        """Have the file name another process that holds the lock with this one."""
        temporary = self.path.with_name(f".{self.path.name}.{self.token}.{os.getpid()}")
        temporary.write_text(json.dumps(holder), encoding="utf-8")
        os.replace(temporary, self.path)

    def beat(self) -> bool:
        """Show that the holder lives, if it is this process; false if a process with another token holds the lock."""
        holder = self.holder()
        if holder is not None and holder.get("token") != self.token:
            return False
        if holder is not None and holder.get("pid") == os.getpid():
            self._beats += 1
            with contextlib.suppress(OSError):  # a full disk: the next beat may work
                self.name_this_process()
        return True

    def release(self) -> None:
        """Give it back, unless somebody else has taken it."""
        holder = self.holder()
        if holder is not None and holder.get("token") == self.token:
            self.path.unlink(missing_ok=True)

    def _me(self) -> Holder:
        owner = {"owner": self.owner} if self.owner else {}
        return {"token": self.token, **owner, **identity(os.getpid()), "since": self._since, "beat": self._beats}

    def _state_of(self, holder: Holder) -> Literal["alive", "unknown", "dead"]:
        """By its pid where it can be seen, else by its heartbeat."""
        if self.owner and holder.get("owner") == self.owner:
            return "dead"  # this job, before it was restarted
        try:
            here = identity(os.getpid())
            if (holder["host"], holder["space"]) == (here["host"], here["space"]):
                process = psutil.Process(holder["pid"])
                is_same = abs(process.create_time() - holder["started"]) <= 1.0
                return "alive" if is_same and process.status() != psutil.STATUS_ZOMBIE else "dead"
        except (KeyError, psutil.Error):
            return "dead"
        if holder != self._watched:
            is_first = self._watched is None or self._watched.get("token") != holder.get("token")
            self._watched, self._watched_since = holder, time.monotonic()
            return "unknown" if is_first else "alive"
        waited = time.monotonic() - self._watched_since
        return "unknown" if waited < BEATS_TO_WAIT * SECONDS_BETWEEN_BEATS else "dead"

    def _remove(self, dead: Holder | None) -> None:
        """Delete a dead holder's file, if it is still there; processes that want to take turns.

        One that looked before another took the lock must not delete the new file: so it looks again in its turn.
        """
        turn = self.path.with_name(f".{self.path.name}.turn")
        try:
            turn.mkdir()
        except FileExistsError:
            self._wait_for(turn)
            return
        try:
            if self.holder() == dead:
                self.path.unlink(missing_ok=True)
        finally:
            with contextlib.suppress(FileNotFoundError):  # a process that waited long took this one for dead
                turn.rmdir()

    def _wait_for(self, turn: Path) -> None:
        """Wait a moment for another process's turn; one that was killed in its turn is not waited for."""
        time.sleep(SECONDS_OF_A_TURN)
        with contextlib.suppress(FileNotFoundError):
            began = turn.stat().st_ctime_ns
            if began != self._turn:
                self._turn, self._turn_since = began, time.monotonic()
            elif time.monotonic() - self._turn_since > BEATS_TO_WAIT * SECONDS_BETWEEN_BEATS:
                turn.rmdir()


class Heart:
    """Beats for lock files from a thread of its own, inside a ``with`` block.

    Args:
        locks: gives those that are held, at each beat.
        lost: is called with one that another process has taken.
    """

    def __init__(self, locks: Callable[[], Iterable[LockFile]], lost: Callable[[LockFile], object]) -> None:
        self._locks, self._lost = locks, lost
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lock files", daemon=True)

    def __enter__(self) -> "Heart":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(SECONDS_BETWEEN_BEATS):
            for lock in list(self._locks()):
                if not lock.beat():
                    self._lost(lock)


@contextmanager
def locked(path: Path, waiting: str) -> Iterator[None]:
    """Hold a lock file; a second process waits for it, and says so with ``waiting``."""
    lock, has_said = LockFile(path), False
    while lock.take() != "mine":
        if not has_said:
            print(waiting, flush=True)
            has_said = True
        time.sleep(SECONDS_BETWEEN_TRIES)
    try:
        with Heart(lambda: [lock], lambda _lock: None):
            yield
    finally:
        lock.release()


def identity(pid: int) -> Holder:
    """What tells a process from all others, also from a later one with its pid: host, space, pid, started."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        space = 0
    return {
        "host": socket.gethostname(),
        "space": space,
        "pid": pid,
        "started": psutil.Process(pid).create_time(),
    }


def _create(content: Path, path: Path) -> bool:
    """Make ``path`` with the content of another file, whole or not at all; false if it exists."""
    try:
        os.link(content, path)  # atomic on NFS, where exclusive creation was not always
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(content.read_text(encoding="utf-8"))
        except FileExistsError:
            return False
    return True


def _parse(path: Path) -> Holder | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
