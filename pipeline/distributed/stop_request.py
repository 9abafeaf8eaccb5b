"""What a rank in training makes of signals: it saves and stops after its step, and a second Ctrl-C ends it."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

from common.errors import EXIT_INTERRUPTED
from common.launch_environment import EARLY_SIGNALS

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Notes SIGTERM, SIGUSR1 and Ctrl-C, which ask a run to save and end after its step, while its block runs.

    A second Ctrl-C ends the process: what was saved before stays as it is.

    Args:
        answer: is called with the first signal, at once and from a thread of its own: the main thread may be waiting
            for other ranks, or computing, for minutes.

    Attributes:
        requested: whether such a signal has come, since the process started.
    """

    def __init__(self, answer: Callable[[int], object]) -> None:
        self.requested = False
        self._answer = answer

    def __enter__(self) -> "StopRequest":
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._thread = threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True)
        self._thread.start()
        self._wakeup = signal.set_wakeup_fd(self._writer)  # gets each signal's number, whatever the main thread does
        self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        if EARLY_SIGNALS:
            self.requested = True
            os.write(self._writer, bytes(EARLY_SIGNALS[:1]))
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writer)  # ends the thread, which would keep what ``answer`` refers to
        self._thread.join()

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True

    def _listen(self, reader: int) -> None:
        seen: list[int] = []
        with open(reader, "rb", buffering=0) as signals:
            while number := signals.read(1):
                if not seen:
                    self._answer(number[0])
                elif number[0] == signal.SIGINT and signal.SIGINT in seen:
                    os._exit(EXIT_INTERRUPTED)  # the main thread, in a collective, can't be interrupted
                seen.append(number[0])
