"""Signals reach a rank that is deep in a computation. Run: pytest tests/pipeline/distributed/test_stop_request.py"""

import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.distributed.stop_request import StopRequest

ROOT = Path(__file__).parents[3]
# The main thread computes in C for a minute: Python's own handlers wait until it is through.
BUSY = """
import hashlib
from pipeline.distributed.stop_request import StopRequest
with StopRequest(lambda number: print("answer", number, flush=True)):
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000_000)
"""


@pytest.fixture
def busy() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", BUSY], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "busy\n"
    yield process
    process.kill()
    process.communicate()


def test_the_first_signal_is_answered_at_once_and_a_second_sigint_ends_the_process_with_130(
    busy: subprocess.Popen[str],
) -> None:
    assert busy.stdout is not None
    busy.send_signal(signal.SIGINT)
    assert busy.stdout.readline() == f"answer {signal.SIGINT:d}\n"
    busy.send_signal(signal.SIGTERM)  # DeepSpeed's launcher sends it after a Ctrl-C
    with pytest.raises(subprocess.TimeoutExpired):
        busy.wait(0.5)
    busy.send_signal(signal.SIGINT)
    assert busy.wait(10) == 130
    assert busy.stdout.read() == ""


class SlowAnswer:
    def __call__(self, number: int) -> None:
        time.sleep(0.5)


def test_nothing_holds_the_answer_after_the_block_though_it_took_longer() -> None:
    answer = SlowAnswer()
    alive = weakref.ref(answer)
    with StopRequest(answer) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.requested
    del answer, stop
    assert alive() is None
