"""What the tests of this folder share."""

import signal
from collections.abc import Iterator

import pytest

from tests.faults.processes import Launch


@pytest.fixture
def launches() -> Iterator[list[Launch]]:
    """Whatever is started is ended, whatever fails."""
    # A shell's background job ignores Ctrl-C, and so would all that it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    started: list[Launch] = []
    yield started
    for launch in started:
        launch.kill()
    signal.signal(signal.SIGINT, before)
