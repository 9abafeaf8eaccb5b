"""Lock files: who waits, who takes over, and who is told. Run: pytest tests/common/test_locks.py"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from common import locks
from common.locks import Heart, LockFile, locked

ROOT = Path(__file__).parents[2]


def test_a_second_process_waits_and_says_so(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from common.locks import locked\n"
        "with locked(Path(sys.argv[1]), 'waiting'): print('in')"
    )
    with locked(tmp_path / "lock", "never"):
        argv = [sys.executable, "-c", code, str(tmp_path / "lock")]
        waiting = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert waiting.stdout is not None and waiting.stdout.readline() == "waiting\n"
    assert waiting.communicate(timeout=60)[0] == "in\n"
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from common.locks import LockFile\n"
        "assert LockFile(Path(sys.argv[1])).take() == 'mine'; os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "lock")], cwd=ROOT, check=False)
    assert (tmp_path / "lock").is_file()
    assert LockFile(tmp_path / "lock").take() == "mine"


def test_a_restarted_job_takes_over_its_own_claims_and_no_others(tmp_path: Path) -> None:
    assert LockFile(tmp_path / "claim", owner="job 1").take() == "mine"
    assert LockFile(tmp_path / "claim", owner="job 2").take() == "alive"
    assert LockFile(tmp_path / "claim", owner="job 1").take() == "mine"


def test_a_holder_on_another_host_is_watched_without_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "SECONDS_BETWEEN_BEATS", 0.1)
    elsewhere = {"token": "theirs", "host": "another", "space": 1, "pid": 1, "started": 0.0, "since": "", "beat": 0}
    (tmp_path / "lock").write_text(json.dumps(elsewhere))
    lock = LockFile(tmp_path / "lock")
    assert lock.take() == "unknown"
    (tmp_path / "lock").write_text(json.dumps(elsewhere | {"beat": 1}))
    assert lock.take() == "alive"
    assert lock.take() == "unknown"
    monkeypatch.setattr(locks, "BEATS_TO_WAIT", 0)
    assert lock.take() == "mine"


def test_a_heart_beats_and_tells_of_a_lock_that_was_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "SECONDS_BETWEEN_BEATS", 0.05)
    lock, lost = LockFile(tmp_path / "lock"), []
    assert lock.take() == "mine"
    with Heart(lambda: [lock], lost.append):
        while (lock.holder() or {})["beat"] < 2:
            pass
        assert lost == []
        (tmp_path / "lock").write_text(json.dumps({"token": "theirs"}))
        while not lost:
            pass
    assert set(lost) == {lock}
    lock.release()
    assert json.loads((tmp_path / "lock").read_text()) == {"token": "theirs"}


def test_a_lock_that_changes_hands_while_it_is_looked_at_stays_with_its_new_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.lock"
    first, second, third = LockFile(path), LockFile(path), LockFile(path)
    assert first.take() == "mine"

    def gone_for_a_moment() -> None:
        monkeypatch.undo()
        first.release()
        assert second.take() == "mine"

    monkeypatch.setattr(third, "holder", gone_for_a_moment)
    assert third.take() == "alive"
    holder = second.holder()
    assert holder is not None
    assert holder["token"] == second.token


def test_a_process_that_was_killed_while_it_removed_a_dead_holder_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "SECONDS_BETWEEN_BEATS", 0.02)
    (tmp_path / "lock").write_text("damaged")
    (tmp_path / ".lock.turn").mkdir()
    assert LockFile(tmp_path / "lock").take() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
