"""One writer per run: a lock file that needs no flock, so that it holds on NFS, and that does not outlive its holder.

The file names its holder: host, process-id space, pid and the process's start. On the same host a dead
holder is seen at once. From another host it is seen by its heartbeat: the holder rewrites a counter every
few seconds, and one that stands still through several beats is dead. No clock is compared with another's.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from common.errors import BusyError

SECONDS_BETWEEN_BEATS = 5.0
BEATS_TO_WAIT = 4
EXIT_LOST_LOCK = 77
TOKEN_VARIABLE = "PIPELINE_RUN_LOCK"  # children of a holder share its lock


class RunLock:
    """Held while a process, or a child that it has started, writes to a run's folder.

    Args:
        folder: the run's.

    Raises:
        BusyError: another process holds it; says which, where and since when.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self.token = os.environ.get(TOKEN_VARIABLE, "")
        self._beat = 0
        self._done = threading.Event()
        self._inherited: dict[str, Any] | None = None

    def __enter__(self) -> "RunLock":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        holder = self._read()
        if holder is not None and self.token and holder.get("token") == self.token:
            self._inherited = holder  # ours by inheritance: name this process, so that it counts if a parent dies
        else:
            self.token = uuid.uuid4().hex
            self._take()
        os.environ[TOKEN_VARIABLE] = self.token
        self._write()
        self._thread = threading.Thread(target=self._keep, name="run lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        holder = self._read()
        if holder is None or holder.get("token") != self.token:
            return
        if self._inherited is not None:
            self._replace(self._inherited)
        else:
            del os.environ[TOKEN_VARIABLE]
            self.path.unlink(missing_ok=True)

    def _take(self) -> None:
        """Create the file; where it exists, make sure that its holder is dead and take it away first."""
        while True:
            mine = self.path.with_name(f".lock.{self.token}")
            mine.write_text(json.dumps(self._me()), encoding="utf-8")
            try:
                if _create(mine, self.path):
                    return
            finally:
                mine.unlink(missing_ok=True)
            holder = self._read()
            if holder is not None and not _is_dead(holder, self._read):
                raise BusyError(
                    f"{self.path.parent}: is in use by process {holder['pid']} on {holder['host']} "
                    f"(since {holder['since']}); wait for it, end it, or give the run another name"
                )
            self._remove(holder)

    def _remove(self, dead: dict[str, Any] | None) -> None:
        """Move a dead holder's file away, unless another process was faster and the file is its."""
        aside = self.path.with_name(f".lock.dead.{self.token}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        moved = _parse(aside)
        if dead is not None and moved is not None and moved.get("token") != dead.get("token"):
            _create(aside, self.path)
        aside.unlink(missing_ok=True)

    def _me(self) -> dict[str, Any]:
        return {
            "token": self.token,
            **_identity(os.getpid()),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "beat": self._beat,
        }

    def _write(self) -> None:
        self._replace(self._me())

    def _replace(self, content: dict[str, Any]) -> None:
        temporary = self.path.with_name(f".lock.{self.token}.{os.getpid()}")
        temporary.write_text(json.dumps(content), encoding="utf-8")
        os.replace(temporary, self.path)

    def _read(self) -> dict[str, Any] | None:
        return _parse(self.path)

    def _keep(self) -> None:
        """Beat until done, while the lock is ours or this process's children's."""
        since = self._me()["since"]
        while not self._done.wait(SECONDS_BETWEEN_BEATS):
            holder = self._read()
            if holder is not None and holder.get("token") != self.token:
                print(f"error: {self.path.parent}: another process ({holder.get('pid')} on {holder.get('host')}) has "
                      "taken this run over; ending", file=sys.stderr, flush=True)  # fmt: skip
                os._exit(EXIT_LOST_LOCK)
            if holder is not None and holder.get("pid") == os.getpid():
                self._beat += 1
                with contextlib.suppress(OSError):  # a full disk: the next beat may work
                    self._replace({**self._me(), "since": since})


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


def _parse(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _identity(pid: int) -> dict[str, Any]:
    """What tells a process from all others, also from a later one with its pid."""
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


def _is_dead(holder: dict[str, Any], read: Any) -> bool:
    """Whether a holder has ended: by its pid where it can be seen, else by its heartbeat."""
    try:
        here = _identity(os.getpid())
        if (holder["host"], holder["space"]) == (here["host"], here["space"]):
            return not psutil.pid_exists(holder["pid"]) or (
                abs(psutil.Process(holder["pid"]).create_time() - holder["started"]) > 1.0
                or psutil.Process(holder["pid"]).status() == psutil.STATUS_ZOMBIE
            )
    except (KeyError, psutil.Error):
        return True
    deadline = time.monotonic() + BEATS_TO_WAIT * SECONDS_BETWEEN_BEATS
    while time.monotonic() < deadline:
        time.sleep(SECONDS_BETWEEN_BEATS / 2)
        if read() != holder:
            return False
    return True
