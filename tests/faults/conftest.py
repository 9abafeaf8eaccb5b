"""What the tests of this folder share."""

from collections.abc import Iterator

import pytest

from tests.faults.processes import Launch


@pytest.fixture
def launches() -> Iterator[list[Launch]]:
    """Whatever is started is ended, whatever fails."""
    started: list[Launch] = []
    yield started
    for launch in started:
        launch.kill()
