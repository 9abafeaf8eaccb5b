"""What goes wrong around a run: two launches, dead launchers, stuck ranks, full disks. Run: pytest tests/faults"""

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.hosts import free_port
from pipeline.checkpoint.store import complete_tags
from pipeline.checkpoint.verify import damaged_files
from pipeline.records.record import read_rows
from tests.faults.disk import SmallDisk, small_disk
from tests.faults.processes import BIN, Launch, wait_for
from tests.helpers.tiny import save_model, write_run

STEPS = 400


def write_long_run(folder: Path, **changes: Any) -> Path:
    """A tiny run of two ranks and many steps, done up to upcycling."""
    settings: dict[str, Any] = {
        "parallel": {"ranks": 2, "ep_size": 2, "micro_batch_size": 2},
        "stage1": {"tokens": 8 * 32 * STEPS},
        "deepspeed": "ds_configs/fp32_zero1.json",
    }
    for key, value in changes.items():
        settings[key] = {**settings[key], **value} if isinstance(settings.get(key), dict) else value
    return write_run(folder, prepared=True, **settings)


def train(path: Path, by: str = "pipeline") -> Launch:
    """Stage 1 by ``python -m pipeline run``, or by the ``deepspeed`` command."""
    log = path.parent / "log"
    if by != "deepspeed":
        return Launch(["run", str(path), "--until", "stage1"], log)
    words = ["--num_gpus", "2", "--master_port", str(free_port()), "launch/train.sh", str(path), "--stage", "1"]
    return Launch(words, log, program=(str(BIN / "deepspeed"),))


def steps_done(path: Path) -> int:
    return len(read_rows(path.parent / "runs" / "tiny" / "stage1" / "metrics.jsonl"))


@pytest.mark.slow
def test_a_second_launch_on_the_same_run_refuses_and_the_first_goes_on(tmp_path: Path, launches: list[Launch]) -> None:
    path = write_long_run(tmp_path)
    launches.append(train(path))
    wait_for(lambda: steps_done(path) >= 2, launches[0])
    second = Launch(["run", str(path)], tmp_path / "second.log")
    launches.append(second)
    assert second.wait(60) == 2
    lines = [line for line in second.log.read_text().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert f"error: {tmp_path}/runs/tiny: is in use by process {launches[0].ranks()[0].pid} on " in lines[0]
    before = steps_done(path)
    wait_for(lambda: steps_done(path) > before, launches[0])
    launches[0].process.send_signal(signal.SIGTERM)
    assert launches[0].wait(60) == 0
    assert not (tmp_path / "runs" / "tiny" / ".lock").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["launch", "pipeline", "deepspeed"])
def test_ranks_whose_launcher_died_end_within_30_seconds_and_the_lock_is_free(
    launcher: str, tmp_path: Path, launches: list[Launch]
) -> None:
    path = write_long_run(tmp_path)
    launches.append(train(path, by=launcher))
    wait_for(lambda: steps_done(path) >= 2, launches[0])
    victim = launches[0].launcher(launcher)
    assert victim is not None
    assert sorted(launches[0].ranks()) == [0, 1]
    victim.kill()
    assert launches[0].wait_until_gone(30) < 30
    assert "its launcher (" in launches[0].log.read_text()
    launches.append(train(path))  # nothing holds the run any more
    done = steps_done(path)
    wait_for(lambda: steps_done(path) > done, launches[1])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["launch", "pipeline"])
def test_ranks_end_whose_launcher_was_killed_while_they_started(
    launcher: str, tmp_path: Path, launches: list[Launch]
) -> None:
    launches.append(train(write_long_run(tmp_path), by=launcher))
    wait_for(lambda: len(launches[0].ranks()) == 2, launches[0])  # they import for seconds, and know no launcher yet
    victim = launches[0].launcher(launcher)
    assert victim is not None
    victim.kill()
    assert launches[0].wait_until_gone(60) < 60


@pytest.mark.slow
def test_a_stuck_rank_ends_the_run_and_the_one_that_waits_says_where(tmp_path: Path, launches: list[Launch]) -> None:
    path = write_long_run(tmp_path, parallel={"timeout_minutes": 0.5})
    launches.append(train(path))
    wait_for(lambda: steps_done(path) >= 2, launches[0])
    launches[0].ranks()[1].send_signal(signal.SIGSTOP)
    assert launches[0].wait_until_gone(120) < 120
    assert launches[0].process.returncode != 0
    log = launches[0].log.read_text()
    # It looks once a second; and the stack of the thread that waits says where in the step.
    assert re.search(r"^error: rank 0: no progress for 3\d s at stage 1, step \d", log, re.M), log[-3000:]
    assert re.search(r"training/step\.py\", line \d+ in train_step$", log, re.M)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", "52m") as disk:
        yield disk


@pytest.mark.slow
@pytest.mark.parametrize("if_full", ["stop", "continue"])
def test_a_full_disk_leaves_the_earlier_checkpoint_intact(
    if_full: str, tmp_path: Path, disk: SmallDisk, launches: list[Launch]
) -> None:
    save_model(tmp_path / "model", hidden_size=128, intermediate_size=1024)  # checkpoints of 34 MB
    path = write_long_run(
        tmp_path,
        output_dir=str(disk.folder),
        stage1={"tokens": 8 * 32 * 12},
        checkpoint={"every_steps": 4, "every_minutes": None, "keep": 2, "if_full": if_full},
    )
    launches.append(train(path))
    assert launches[0].wait(200) == 2  # at the latest the last checkpoint must be written
    log = launches[0].log.read_text()
    stage = disk.folder / "tiny" / "stage1"
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, log[-3000:]
    stopped_at = "step000008" if if_full == "stop" else "step000012"
    assert (
        f"{stage / stopped_at}: can't be written (the disk is full); checkpoints before it are unchanged" in errors[0]
    )
    assert ("step000008: can't be written (the disk is full)" in log) and ("training continues" in log) == (
        if_full == "continue"
    )
    assert complete_tags(stage) == ["step000004"]
    assert [path.name for path in stage.glob("step*")] == ["step000004"]
    assert damaged_files(stage / "step000004") == []
    disk.resize("200m")
    launches.append(train(path))
    assert launches[1].wait(200) == 0, launches[1].log.read_text()[-3000:]
    assert "after 4 steps" in launches[1].log.read_text()
    assert [row["step"] for row in read_rows(stage / "metrics.jsonl")] == list(range(1, 13))
