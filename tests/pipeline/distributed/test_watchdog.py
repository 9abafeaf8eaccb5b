"""A rank ends when those that started it have. Run: pytest tests/pipeline/distributed/test_watchdog.py"""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pipeline.distributed.watchdog import EXIT_ORPHANED, STARTED_BY, starter

PROGRAM = """
import time
from pipeline.distributed.watchdog import Watchdog
Watchdog(3, 60.0).start()
time.sleep(60)
"""


def test_a_rank_ends_if_what_started_it_was_gone_before_it_looked() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    started = psutil.Process(ended.pid).create_time()
    ended.wait()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, STARTED_BY: f"{ended.pid} {started}"},
        cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False, timeout=50,
    )  # fmt: skip
    assert done.returncode == EXIT_ORPHANED
    assert done.stderr == f"error: rank 3: its launcher (pid {ended.pid}) is gone; ending at the start\n"


@pytest.mark.parametrize(("shift", "is_it"), [(0.0, True), (1.0, True), (3600.0, False)])
def test_a_process_is_known_by_its_start_too(monkeypatch: pytest.MonkeyPatch, shift: float, is_it: bool) -> None:
    own = psutil.Process()
    monkeypatch.setenv(STARTED_BY, f"{own.pid} {own.create_time() + shift}")
    assert [process is not None for process, _ in starter()] == [is_it]
