"""Ctrl-C, as a terminal sends it: to all processes of the command's group. Run: pytest tests/faults/test_ctrl_c.py"""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.hosts import free_port
from pipeline.checkpoint.store import complete_tags
from pipeline.checkpoint.verify import damaged_files
from tests.faults.processes import BIN, Launch, wait_for
from tests.helpers.tiny import save_corpus, write_run

MICRO_STEPS = 250  # of a step: seconds, and fewer than the 30 that DeepSpeed waits for
BATCH = 2 * MICRO_STEPS
ENDED = "ended by SIGINT; the same command resumes from what is complete"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of long steps on two ranks, done up to upcycling."""
    return write_run(
        tmp_path_factory.mktemp("ctrl_c"),
        prepared=True,
        parallel={"ranks": 2, "ep_size": 2, "micro_batch_size": 1},
        stage1={"tokens": 20 * BATCH * 32, "global_batch_size": BATCH},
        checkpoint={"every_steps": 1, "every_minutes": None},
    )


def press(launch: Launch) -> None:
    launch.look()
    os.killpg(launch.process.pid, signal.SIGINT)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_step_with_130_and_no_traceback_and_the_last_checkpoint_is_sound(
    path: Path, launches: list[Launch]
) -> None:
    stage = path.parent / "runs" / "tiny" / "stage1"
    launches.append(Launch(["run", str(path), "--until", "stage1"], path.parent / "train.log"))
    log = launches[0].log
    wait_for(lambda: ": saved " in log.read_text(), launches[0])
    press(launches[0])
    wait_for(lambda: "stopping after" in log.read_text(), launches[0], 5)
    press(launches[0])
    assert launches[0].wait(90) == 130
    assert launches[0].wait_until_gone(60) < 60
    after = log.read_text().splitlines()
    after = after[next(i for i, line in enumerate(after) if "stopping after" in line) :]
    assert re.fullmatch(r"stage 1: stopping after this step, about \d+ s; again to end now", after[0])
    assert after[1:] == [ENDED]
    assert [damaged_files(stage / tag) for tag in complete_tags(stage)] == [[]]


@pytest.mark.slow
def test_ctrl_c_under_deepspeed_itself_saves_and_the_ranks_end(path: Path, launches: list[Launch]) -> None:
    stage = path.parent / "runs" / "tiny" / "stage1"
    log, words = path.parent / "deepspeed.log", ["launch/train.sh", str(path), "--stage", "1"]
    options = ["--num_gpus", "2", "--master_port", str(free_port())]
    launches.append(Launch([*options, *words], log, program=(str(BIN / "deepspeed"),)))
    wait_for(lambda: "M parameters train" in log.read_text(), launches[0])
    time.sleep(1)  # in its step
    press(launches[0])
    launches[0].wait(90)  # at once, with a traceback of DeepSpeed's, or after the ranks
    assert launches[0].wait_until_gone(60) < 60
    assert "again to end now\n" in log.read_text()
    assert "stage 1: stopped by a signal after" in log.read_text()
    assert "error: " not in log.read_text()
    assert damaged_files(stage / complete_tags(stage)[0]) == []


def ends_with_one_line(launch: Launch, when: Callable[[], Any]) -> None:
    """Press Ctrl-C when something has begun, and see all processes end."""
    wait_for(when, launch)
    before = launch.log.read_text()
    press(launch)
    assert launch.wait(90) == 130
    assert launch.wait_until_gone(60) < 60
    lines = launch.log.read_text()[len(before) :].splitlines()
    bar = re.compile(r"[\w ]+: [\d,]+/[\d,]+ \w+, ")  # how far it had come
    assert [line for line in lines if not bar.match(line)] == [ENDED]


def test_ctrl_c_while_ranks_start_is_one_line_and_130(path: Path, tmp_path: Path, launches: list[Launch]) -> None:
    launches.append(Launch(["train", str(path), "--stage", "1"], tmp_path / "log"))
    ends_with_one_line(launches[0], lambda: len(launches[0].ranks()) == 2)


@pytest.mark.slow
def test_ctrl_c_while_ranks_evaluate_is_one_line_and_130(tmp_path: Path, launches: list[Launch]) -> None:
    long = save_corpus(tmp_path / "long", ["tr"], pages=20_000)["tr"]  # so that the bar's first line comes
    watch = {"watch": {"long": {"path": str(long), "language": "tr"}}}
    path = write_run(tmp_path, prepared=True, parallel={"ranks": 2, "ep_size": 2}, data=watch)
    launches.append(Launch(["evaluate", str(path), "--checkpoint", "base"], tmp_path / "log"))
    ends_with_one_line(launches[0], lambda: "evaluate base: " in launches[0].log.read_text())


def test_ctrl_c_in_a_step_of_a_process_of_its_own_is_one_line_and_130(
    path: Path, tmp_path: Path, launches: list[Launch]
) -> None:
    words = ["run", str(path), "--set", "name=other", "--set", "similarity.tokens=400", "--until", "similarity"]
    launches.append(Launch(words, tmp_path / "log"))
    ends_with_one_line(launches[0], lambda: len(launches[0].look()) == 2)


@pytest.mark.slow
def test_ctrl_c_ends_tokenizing_and_its_workers_with_one_line_and_130(tmp_path: Path, launches: list[Launch]) -> None:
    path = write_run(tmp_path)
    save_corpus(tmp_path / "text", ["en", "el", "hu"], pages=20_000)
    words = [str(path), "--workers", "2", "--set", "data.slice_bytes=1_000_000"]
    launches.append(Launch(words, tmp_path / "log", program=("-m", "data_prep")))
    ends_with_one_line(launches[0], lambda: len(launches[0].look()) >= 4)  # it, two workers and their resource tracker
