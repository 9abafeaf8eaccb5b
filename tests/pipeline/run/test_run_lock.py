"""One writer per run, also where the holder is on another host. Run: pytest tests/pipeline/run/test_run_lock.py"""

import json
import multiprocessing
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from common import locks
from common.errors import UserError
from common.locks import identity
from pipeline.run.run_lock import TOKEN_VARIABLE, RunLock


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "SECONDS_BETWEEN_BEATS", 0.1)
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)


def holder_elsewhere(folder: Path, **changes: Any) -> dict[str, Any]:
    """A lock that a process on another host holds."""
    content = {
        "token": "theirs",
        "host": "another-host",
        "space": 1,
        "pid": 1,
        "started": 0.0,
        "since": "then",
        "beat": 0,
    }
    (folder / ".lock").write_text(json.dumps(content | changes))
    return content | changes


def test_the_lock_is_there_while_held_and_gone_after(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / ".lock").read_text())["pid"] == os.getpid()
        assert TOKEN_VARIABLE in os.environ
    assert not (tmp_path / "run" / ".lock").exists()
    assert TOKEN_VARIABLE not in os.environ


def test_a_live_holder_on_this_host_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunLock(tmp_path):
        monkeypatch.delenv(TOKEN_VARIABLE)  # as another command sees it
        with (
            pytest.raises(UserError, match=f"is in use by process {os.getpid()} on .* wait for it, end it"),
            RunLock(tmp_path),
        ):
            pass
        monkeypatch.setenv(TOKEN_VARIABLE, json.loads((tmp_path / ".lock").read_text())["token"])


def take_and_hand_over(folder: Path, pids: Any) -> None:
    with RunLock(folder):
        pids.put((os.getpid(), json.loads((folder / ".lock").read_text())["pid"]))


def test_a_child_of_the_holder_holds_it_too_and_gives_it_back(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    pids = context.Queue()
    with RunLock(tmp_path):
        child = context.Process(target=take_and_hand_over, args=(tmp_path, pids))
        child.start()
        pid, holder = pids.get(timeout=60)
        child.join()
        assert child.exitcode == 0
        assert pid == holder == child.pid
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_dead_process_does_not_hold_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=os.getpid)
    child.start()
    child.join()
    holder_elsewhere(tmp_path, **identity(os.getpid()), token="dead")
    content = json.loads((tmp_path / ".lock").read_text()) | {"pid": child.pid}
    (tmp_path / ".lock").write_text(json.dumps(content))
    with RunLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_process_that_took_over_a_dead_ones_number_does_not_hold_it(tmp_path: Path) -> None:
    me = identity(os.getpid())
    holder_elsewhere(tmp_path, **me | {"started": me["started"] - 100})
    with RunLock(tmp_path):
        pass


def test_on_another_host_a_heart_that_beats_refuses_and_one_that_stands_still_is_dead(tmp_path: Path) -> None:
    content = holder_elsewhere(tmp_path)
    done = threading.Event()

    def beat() -> None:
        while not done.wait(0.05):
            content["beat"] += 1
            temporary = tmp_path / "beat"
            temporary.write_text(json.dumps(content))
            os.replace(temporary, tmp_path / ".lock")

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="is in use by process 1 on another-host"), RunLock(tmp_path):
            pass
    finally:
        done.set()
        thread.join()
    with RunLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["host"] != "another-host"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"token": 1}'])
def test_a_damaged_lock_is_no_holder(content: str, tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(content)
    with RunLock(tmp_path):
        pass


def hold(folder: Path, started: Any, results: Any, all_have_tried: Any) -> None:
    os.environ.pop(TOKEN_VARIABLE, None)
    started.wait(60)
    try:
        with RunLock(folder):
            results.put("held")
            all_have_tried.wait(60)
    except UserError:
        results.put("refused")


def test_of_many_at_once_over_a_dead_holder_exactly_one_gets_it(tmp_path: Path) -> None:
    me = identity(os.getpid())
    holder_elsewhere(tmp_path, **me | {"started": me["started"] - 100})
    context = multiprocessing.get_context("fork")
    started, results, all_have_tried = context.Barrier(6), context.Queue(), context.Event()
    children = [context.Process(target=hold, args=(tmp_path, started, results, all_have_tried)) for _ in range(6)]
    for child in children:
        child.start()
    outcomes = sorted(results.get(timeout=90) for _ in children)
    all_have_tried.set()
    for child in children:
        child.join()
    assert outcomes == ["held"] + ["refused"] * 5
