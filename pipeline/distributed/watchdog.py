"""Ends a rank that can't continue: its launcher is gone, or it has waited too long for the other ranks."""

import faulthandler
import os
import sys
import threading
import time

import psutil

EXIT_ORPHANED, EXIT_STUCK = 75, 76
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_A_CLOCK_IS_SET = 5.0
STARTED_BY = "MOE_LPR_STARTED_BY"  # pid and start of the process that started the ranks on this machine
_LAUNCHERS = ("deepspeed", "deepspeed.launcher.launch", "pipeline", "mpirun", "mpiexec", "prterun", "torchrun")


class Watchdog:
    """Watches one rank from a separate thread, and ends its process if it can't continue.

    Args:
        rank: this rank's number.
        timeout: seconds without a call of :meth:`at` after which the rank prints where it is and ends.
    """

    def __init__(self, rank: int, timeout: float) -> None:
        self.rank, self.timeout = rank, timeout
        self._where, self._since = "the start", time.monotonic()
        self._launchers = [*launchers(), *starter()]
        self._done = threading.Event()

    def start(self) -> "Watchdog":
        """Start the thread; returns self."""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def stop(self) -> None:
        """Stop watching: the rank is done."""
        self._done.set()

    def stopping(self) -> None:
        """Note that the rank is asked to save and end: its launcher, asked too, may be gone before it."""
        self._launchers = []

    def at(self, where: str) -> None:
        """Note that the rank has come this far, and count its time from 0."""
        self._where, self._since = where, time.monotonic()

    def _watch(self) -> None:
        while not self._done.wait(SECONDS_BETWEEN_LOOKS):
            gone = next((name for process, name in self._launchers if not _alive(process)), None)
            if gone is not None:
                self._end(EXIT_ORPHANED, f"its launcher ({gone}) is gone; ending at {self._where}")
            waited = time.monotonic() - self._since
            if waited > self.timeout:
                faulthandler.dump_traceback(all_threads=True)
                self._end(
                    EXIT_STUCK,
                    f"no progress for {waited:.0f} s at {self._where}: a peer is gone or stuck, or "
                    "parallel.timeout_minutes is too short; start the run again, it resumes from its last checkpoint",
                )

    def _end(self, code: int, why: str) -> None:
        print(f"error: rank {self.rank}: {why}", file=sys.stderr, flush=True)
        os._exit(code)  # the main thread, in a collective, can't be interrupted


def launchers() -> list[tuple[psutil.Process | None, str]]:
    """The process that started this rank, and the launchers above it, nearest first; each with its name and pid."""
    if "RANK" not in os.environ:
        return []
    found: list[tuple[psutil.Process | None, str]] = []
    for process in psutil.Process().parents():
        try:
            words = process.cmdline()
        except psutil.Error:
            break
        name = next((os.path.basename(word) for word in words[:4] if os.path.basename(word) in _LAUNCHERS), None)
        if found and name is None:
            break
        found.append((process, f"{name or process.name()}, pid {process.pid}"))
    return found


def starter() -> list[tuple[psutil.Process | None, str]]:
    """The process that ``STARTED_BY`` names, None if it is gone already: it may end while ranks still start."""
    pid, _, started = os.environ.get(STARTED_BY, "").partition(" ")
    if not pid:
        return []
    try:
        process = psutil.Process(int(pid))
        is_it = abs(process.create_time() - float(started)) < SECONDS_A_CLOCK_IS_SET  # or another with its number
    except psutil.NoSuchProcess:
        is_it = False
    return [(process if is_it else None, f"pid {pid}")]


def _alive(process: psutil.Process | None) -> bool:
    try:
        return process is not None and process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
